"""What a causal model writes behind a prompt, token after token the likeliest: the same bytes for any tokenizer."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from matt_fast.alignment.vocabulary import start_of_text
from matt_fast.evaluation.bits_per_byte import cut_pieces
from matt_fast.model.positions import position_limit
from matt_fast.model.sampling import no_settings
from matt_fast.support.checks import MANY, check_range

PROMPT_BYTES = 100
UNFINISHED = 3  # replacement signs, at most, that the first bytes of a character are decoded to
TOKENS = 40  # of the original model, that a completion is as long as


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    n_bytes: int,
    *,
    on_prompt: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy completions of the same length in bytes, without penalties, whatever the model's generation settings say.

    A prompt is given as plain text behind the tokenizer's start of text; no chat template is applied.

    Args:
        model: a causal language model.
        tokenizer: its own.
        prompts: texts, each completed alone.
        n_bytes: UTF-8 bytes of a completion; fewer where the model ends the text or has no more positions, or where
            they would end inside a character.
        on_prompt: called with the number of prompts that are completed, after each.

    Returns:
        What stands behind each prompt.

    Raises:
        ValueError: a prompt is empty, or fills the model's positions; the tokenizer has no token to begin a text with.
    """
    check_range("n_bytes", n_bytes, 1, MANY)
    limit, start = position_limit(model), start_of_text(tokenizer)
    found = []
    for prompt in prompts:
        ids = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not prompt or not ids:
            raise ValueError(f"prompts: wanted text, got {prompt!r}")
        if limit is not None and len(ids) >= limit:
            raise ValueError(f"prompts: wanted fewer than the model's {limit} tokens, got {len(ids)}: {prompt[:40]!r}")
        room = n_bytes if limit is None else min(n_bytes, limit - len(ids))
        enough = _EnoughBytes(tokenizer, ids, n_bytes)
        inputs = torch.tensor([ids], device=model.device)
        options = {"attention_mask": torch.ones_like(inputs), "stopping_criteria": [enough]}
        settings = _greedy(model, tokenizer, room)
        with no_settings(model):
            generated = model.generate(inputs, generation_config=settings, **options)
        text = enough.written(generated[0].tolist())
        found.append(text.encode()[:n_bytes].decode(errors="ignore"))
        on_prompt(len(found))
    return found


def completion_bytes(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> int:
    """How many bytes some 40 tokens of a tokenizer are, by what the prompts take it."""
    tokens = sum(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts)
    return max(1, round(TOKENS * sum(len(prompt.encode()) for prompt in prompts) / max(1, tokens)))


def first_words(documents: Iterable[str], count: int, n_bytes: int = PROMPT_BYTES) -> list[str]:
    """Prompts out of held-out text: the beginnings of its first documents.

    Of fewer documents than `count` the beginnings of further pieces are taken; none comes twice. They end before a
    space, where there is one in their second half.

    Args:
        documents: texts.
        count: of prompts, at most.
        n_bytes: UTF-8 bytes of each, at most.
    """
    beginnings: list[str] = []
    others: list[str] = []
    for document in documents:
        for number, piece in enumerate(itertools.islice(cut_pieces([document], 4 * n_bytes), count)):
            prompt, group = _beginning(piece, n_bytes), others if number else beginnings
            if prompt not in (*beginnings, *others):  # documents can begin alike
                group.append(prompt)
        if len(beginnings) >= count:
            break
    return (beginnings + others)[:count]


def _beginning(text: str, n_bytes: int) -> str:
    text = text.lstrip()
    cut = text.encode()[:n_bytes].decode(errors="ignore")
    if len(cut) < len(text):
        words, space, rest = cut.rpartition(" ")
        if space and len(words) >= len(rest):
            return words.rstrip()
    return cut.rstrip()


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int) -> GenerationConfig:
    """The likeliest token each time, until the model ends the text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
    return GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad,
    )


class _EnoughBytes(StoppingCriteria):
    """Stops as soon as what is written behind the prompt has so many bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], n_bytes: int):
        self.tokenizer, self.prompt, self.n_bytes = tokenizer, prompt, n_bytes
        self.before = self._text(prompt)

    def __call__(self, input_ids: torch.Tensor, scores, **options) -> torch.Tensor:
        done = len(self.written(input_ids[0].tolist()).encode()) >= self.n_bytes
        return torch.full((1,), done, dtype=torch.bool, device=input_ids.device)

    def written(self, ids: list[int]) -> str:
        """What stands behind the prompt. Both are decoded together: a decoder drops the space before a first word."""
        text = self._text(ids)[len(self.before) :]
        unfinished = next((n for n in range(UNFINISHED) if not text[: len(text) - n].endswith("\ufffd")), UNFINISHED)
        return text[: len(text) - unfinished]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
