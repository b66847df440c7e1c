"""The end of a run: its model card and summary, and the result that a call gives back."""

import json
from dataclasses import asdict, fields
from typing import Any

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport, Rows
from matt_fast.recipe.base_card import read_base
from matt_fast.recipe.card import model_card
from matt_fast.recipe.completing import read_completions
from matt_fast.recipe.config import resolved_config
from matt_fast.recipe.rehearsal import rehearsal_of
from matt_fast.recipe.result import Healing, Rehearsal, SnippetCounts, TransferResult
from matt_fast.recipe.snippets import snippet_counts
from matt_fast.recipe.training_stages import NUMBERS, seen_in
from matt_fast.recipe.work import Work
from matt_fast.report.curves import draw_curves
from matt_fast.report.writing import write_report
from matt_fast.runs.folder import damaged_files
from matt_fast.runs.record import HELD_OUT
from matt_fast.support.checks import made_of
from matt_fast.support.files import write_text
from matt_fast.support.memory import peak_memory
from matt_fast.training.state import Progress


def finish(work: Work, vocabulary: VocabularyPair, start: Rows) -> TransferResult:
    """Write the model card and the summary, and remove what only going on would need."""
    result = _result(work, vocabulary, start)
    work.processes.wait()  # all have read what is removed now
    if work.is_main:
        job, run = work.job, work.run
        arguments, base = resolved_config(job.arguments(run.output)), read_base(job.model, work.say)
        arguments |= {"init": f"<{job.init_name}>"} if callable(job.init) else {}
        tag = base.pipeline_tag or work.teacher.kind.pipeline_tag
        processes = work.accelerator.num_processes
        lost = run.read("state.json").get("lost", ())
        card = model_card(result, arguments, base, lost, pipeline_tag=tag, processes=processes)
        write_text(run.output / "README.md", card)
        summary = {x.name: getattr(result, x.name) for x in fields(result)}
        summary |= {"output": str(result.output), "progress": asdict(result.progress)}
        summary |= {"report": asdict(result.report), "evaluations": run.read("evaluations.json")}
        del summary["other_texts"]  # they are among them
        summary["healing"] = None if result.healing is None else asdict(result.healing)
        summary["snippets"] = None if result.snippets is None else asdict(result.snippets)
        summary["rehearsal"] = None if result.rehearsal is None else asdict(result.rehearsal)
        summary["report"] |= {"made": []}  # token_provenance.jsonl has them
        run.write("result.json", summary)
        if result.progress.step:
            draw_curves(run.path("metrics.jsonl"), run.path("curves.png"), work.say)
        write_report(run.output, vocabulary, work.say)
        run.finish()
    work.processes.wait()
    return result


def finished_result(work: Work) -> TransferResult:
    """The result of a run that is finished already.

    Raises:
        ValueError: what is asked for now is not what the run did.
    """
    before, now = work.run.read("run.json")["settings"], json.loads(json.dumps(work.settings))
    other = [f"{name}: was {before.get(name)!r}, now {now[name]!r}" for name in now if now[name] != before.get(name)]
    if other:
        raise ValueError(
            f"resume: the run in {str(work.run.output)!r} is finished and cannot go on with {'; '.join(other)}; give "
            "another output. To train its result on: model and tokenizer that folder, teacher the original"
        )
    with damaged_files(work.run.path("result.json"), work.run.argument):
        result = _read_result(work)
    if work.is_main:
        work.run.finish()  # a kill may have left a part of what is removed
        work.listeners.on_message(f"The run in {work.run.output} is finished.")
    return result


def _read_result(work: Work) -> TransferResult:
    values = work.run.read("result.json")
    values["output"] = work.run.output
    values["report"] = InitReport.of_json(values["report"])
    values |= _evaluations(work, values.pop("evaluations")) | _training(values)
    if values["healing"] is not None:
        values["healing"] = made_of(Healing, values["healing"] | _training(values["healing"]))
    if values["snippets"] is not None:
        values["snippets"] = made_of(SnippetCounts, values["snippets"])
    if values.get("rehearsal") is not None:
        values["rehearsal"] = made_of(Rehearsal, values["rehearsal"])
    return made_of(TransferResult, values)


def _result(work: Work, vocabulary: VocabularyPair, start: Rows) -> TransferResult:
    """What the stages left on disk, in one piece."""
    run = work.run
    folder = run.path("trained")
    numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    healed = None
    if work.job.healing is not None:
        healed = json.loads((run.path("healed") / NUMBERS).read_text(encoding="utf-8"))
    seconds = run.read("state.json").get("seconds", {})
    for stage, found in (("training", numbers), ("healing", healed)):
        if stage in seconds:  # of the process that ended it; those that were stopped in it count too
            seconds[stage] = max(seconds[stage], found["progress"]["seconds"])
    seen = seen_in(work)
    trainable = [i for i in range(vocabulary.rows) if not (work.job.freeze_shared and i in vocabulary.matches)]
    return TransferResult(
        output=run.output,
        n_layers=numbers["n_layers"],
        shared=len(vocabulary.matches),
        new=len(vocabulary.new),
        unspelled=len(vocabulary.new) - len(vocabulary.subtokens),
        report=start.report,
        trainable=len(trainable),
        seen=int((seen[trainable] > 0).sum()),
        **_training(numbers),
        **_evaluations(work, run.read("evaluations.json")),
        completions=read_completions(run),
        best_step=numbers["best_step"],
        seconds=seconds,
        training_memory=max(x["training_memory"] for x in (numbers, healed) if x),
        peak_memory=max(
            peak_memory(work.device),
            *(x[name] for x in (numbers, healed) if x for name in ("peak_memory", "training_memory")),
        ),
        healing=None if healed is None else _healing(work, healed),
        snippets=snippet_counts(run),
        rehearsal=rehearsal_of(run),
    )


def _evaluations(work: Work, found: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The fields of a result that evaluations.json has: stage -> text -> figures."""
    by_text = {
        text: {stage: made_of(Evaluation, figures[text]) for stage, figures in found.items()}
        for text in work.job.held_out
    }
    texts = list(by_text)
    return {
        "evaluations": by_text[texts[0]] if texts else {},
        "text": texts[0] if texts else HELD_OUT,
        "other_texts": {text: by_text[text] for text in texts[1:]},
    }


def _training(numbers: dict) -> dict[str, Any]:
    """The fields of a result that a training's numbers have."""
    validation = [(step, bits) for step, bits in numbers["validation"]]
    return {"progress": made_of(Progress, numbers["progress"]), "validation": validation}


def _healing(work: Work, numbers: dict) -> Healing:
    return Healing(
        method=work.job.healing.method,
        trained_numbers=numbers["trained_numbers"],
        best_step=numbers["best_step"],
        **_training(numbers),
    )
