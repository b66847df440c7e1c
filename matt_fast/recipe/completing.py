"""The completions of a transfer: what the original and the result write behind the same words of held-out text."""

import itertools

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.data.documents import read_documents
from matt_fast.evaluation.completions import PROMPT_BYTES, complete, completion_bytes, first_words
from matt_fast.model.positions import position_limit
from matt_fast.recipe.work import Work
from matt_fast.runs.folder import Run

FILE = "completions.json"


def write_completions(work: Work, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Complete the prompts with a model, "original" first and then "adapted": `completions.json`."""
    done, job = work.run.read(FILE), work.job
    if not job.completions or work.teacher.masked or name in done or not model.can_generate():
        return
    if name != "original" and not done.get("prompts"):  # the run began without
        return
    with work.stage(f"completions ({name})"):
        if name == "original":
            limit = position_limit(model)
            done["prompts"] = _prompts(work, PROMPT_BYTES if limit is None else min(PROMPT_BYTES, limit // 2))
            done["bytes"] = completion_bytes(tokenizer, [prompt for _, prompt in done["prompts"]])
        prompts = [prompt for _, prompt in done["prompts"]]
        told = lambda count: work.tell("prompts", count, len(prompts))  # noqa: E731
        model.to(work.device).eval()
        done[name] = complete(model, tokenizer, prompts, done["bytes"], on_prompt=told)
        work.run.write(FILE, done)


def read_completions(run: Run) -> list[dict[str, str]]:
    """`TransferResult.completions`, of what both models have written."""
    found = run.read(FILE)
    if not {"original", "adapted"} <= found.keys():
        return []
    rows = zip(found["prompts"], found["original"], found["adapted"], strict=True)
    return [{"text": t, "prompt": p, "original": o, "adapted": a} for (t, p), o, a in rows]


def _prompts(work: Work, n_bytes: int) -> list[tuple[str, str]]:
    """(name of the held-out text, prompt), from each text in turn, none twice."""
    job, of_each = work.job, []
    for name, place in job.held_out.items():
        documents = map(_body, read_documents(place, split=job.split, text_field=job.text_field))
        of_each.append([(name, prompt) for prompt in first_words(documents, job.completions, n_bytes)])
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*of_each))
    by_prompt = {prompt: name for name, prompt in reversed([x for x in in_turn if x is not None])}
    return [(name, prompt) for prompt, name in reversed(by_prompt.items())][: job.completions]


def _body(document: str) -> str:
    """A document from a line in its second third on: they begin with titles and licences."""
    return document[document.find("\n", len(document) // 3) + 1 :] or document
