"""How a causal language model goes on with texts: drawn at random, each with random numbers of its own."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

TEMPERATURE, TOP_K, TOP_P = 0.8, 100, 0.95
ROWS_AT_ONCE = 64


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    numbers: NDArray[np.float64],
    usable: torch.Tensor,
    ends: Sequence[int] = (),
    *,
    shortest: int = 0,
    temperature: float = TEMPERATURE,
    top_k: int | None = TOP_K,
    top_p: float = TOP_P,
    once: Callable[[str, Callable[[], list]], list] = lambda key, make: make(),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[int]]:
    """Continue each prompt by sampling.

    A row's tokens are decided by its prompt and its numbers; the rows beside it change no more than the last bits of
    the model's scores.

    Args:
        model: a causal language model.
        prompts: n lists of token ids, none empty.
        numbers: [n, longest] float64 in [0, 1), one for each token that is drawn.
        usable: [rows] bool, the ids that may be drawn.
        ends: ids that end a continuation, and are no part of it.
        shortest: tokens before one of `ends` may come.
        temperature: the scores are divided by it.
        top_k: the likeliest tokens that may be drawn; all if None.
        top_p: of these so many as come to this share, likeliest first; 1 takes all.
        once: called for each batch of prompts with a key and a function that continues them; gives what that gives, or
            what it gave before under this key (`support.journal`).
        on_progress: called with the prompts done and n.

    Returns:
        The new tokens of each prompt, at most `longest`.

    Raises:
        ValueError: the model is of a class that cannot generate.
    """
    if not model.can_generate():
        raise ValueError(f"model: wanted one that transformers can generate with, got {type(model).__name__}")
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # rows of alike lengths need little padding
    ends = list(ends)
    settings = [ends, shortest, temperature, top_k, top_p]
    options = GenerationConfig(
        do_sample=False,  # `_Draw` leaves one token
        max_new_tokens=numbers.shape[1],
        min_new_tokens=shortest or None,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    with no_settings(model):
        for first in range(0, len(order), ROWS_AT_ONCE):
            rows = order[first : first + ROWS_AT_ONCE]
            some, drawn = [list(prompts[i]) for i in rows], numbers[rows]
            key = hashlib.sha256(json.dumps([settings, some]).encode() + drawn.tobytes()).hexdigest()
            given = torch.from_numpy(drawn).float().to(model.device), usable.to(model.device)
            draw = _Draw(*given, max(map(len, some)), temperature, top_k, top_p)
            generate = partial(_generated, model, some, options, draw)
            for i, row in zip(rows, once(key, generate), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                found[i] = row[:end]
            on_progress(first + len(rows), len(order))
    return found


@contextmanager
def no_settings(model: PreTrainedModel) -> Iterator[None]:
    """Hide a model's own generation settings, which transformers mixes into those that `generate` is given."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _generated(
    model: PreTrainedModel, prompts: list[list[int]], options: GenerationConfig, draw: "_Draw"
) -> list[list[int]]:
    """What a model writes behind prompts, which are filled up on the left."""
    ids = torch.full((len(prompts), width := draw.width), options.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generated = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=options,
        logits_processor=LogitsProcessorList([draw]),
    )
    return generated[:, width:].tolist()


class _Draw(LogitsProcessor):
    """Leaves the one token of each row that its number of this step falls on, likeliest tokens first."""

    def __init__(
        self,
        numbers: torch.Tensor,
        usable: torch.Tensor,
        width: int,
        temperature: float,
        top_k: int | None,
        top_p: float,
    ):
        self.numbers, self.width, self.usable = numbers, width, usable
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = self.numbers[:, input_ids.shape[1] - self.width, None]
        usable = torch.nn.functional.pad(self.usable, (0, scores.shape[1] - len(self.usable)))
        most = scores.shape[1] if self.top_k is None else min(self.top_k, scores.shape[1])
        likeliest, ids = scores.masked_fill(~usable, -torch.inf).topk(most)
        shares = (likeliest.float() / self.temperature).softmax(-1)
        sums = shares.cumsum(-1)
        kept = ((sums - shares) < self.top_p).sum(-1, keepdim=True)
        place = torch.searchsorted(sums, numbers * sums.gather(-1, kept - 1), right=True).clamp(max=kept - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, ids.gather(-1, place), 0.0)
