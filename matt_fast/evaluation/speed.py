"""How fast models read and write the same text, in characters, and how much memory text takes them.

That is what a tokenizer is changed for. The text is given, so that all models read and write the same characters: the
time of a token does not depend on which one it is.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from matt_fast.alignment.vocabulary import start_of_text
from matt_fast.evaluation.bits_per_byte import check_positions, cut_pieces
from matt_fast.model.positions import position_limit

READ, WRITTEN = 800, 200  # UTF-8 bytes of a passage
PASSAGES, ROUNDS = 2, 5


@dataclass(frozen=True)
class Speed:
    """How fast a model is, one text at a time (batch 1), with a cache of keys and values.

    Attributes:
        reading, writing: characters a second of each round: of the prompt in one pass (prefill), and of the text behind
            it, token after token (generation).
        reading_ratio, writing_ratio: the same over the first model's of that round.
        characters_per_token: of the passages.
        embedding_bytes: of the input embedding, and of the output head where it has a table of its own.
        cache_bytes: of keys and values of 1,000 characters; None where the model has no such cache.
    """

    reading: list[float]
    writing: list[float]
    reading_ratio: list[float]
    writing_ratio: list[float]
    characters_per_token: float
    embedding_bytes: int
    cache_bytes: float | None


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, most)."""
    return median(values), min(values), max(values)


def passages(documents: Iterable[str], count: int = PASSAGES) -> list[tuple[str, str]]:
    """(what is read, what is written) of each of the first pieces of a held-out text that are long enough.

    Raises:
        ValueError: no piece is.
    """
    found = []
    for piece in cut_pieces(documents, 2 * (READ + WRITTEN)):
        data = piece.encode()
        if len(data) >= READ + WRITTEN:
            text = data[: READ + WRITTEN].decode(errors="ignore")
            end = len(data[:READ].decode(errors="ignore"))
            end = text.rfind(" ", 1, end) if " " in text[1:end] else end  # no word is cut
            found.append((text[:end], text[end:]))
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"data: wanted a document of {READ + WRITTEN:,} bytes to measure speed on, got none")
    return found


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    texts: Sequence[tuple[str, str]],
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Speed]:
    """Time models on the same passages, in turn: what else the machine does slows all of them.

    Args:
        models: name -> a causal model, on its device in evaluation mode, and its tokenizer; the first is compared with.
        texts: see `passages`.
        rounds: over all passages; one more before them is not counted.
        clock: seconds; the time on the wall by default.
        on_round: called with the rounds that are done, after each.

    Raises:
        ValueError: a passage has more tokens than a model has positions; a tokenizer has no token to begin a text with;
            a model gives back nothing that it could go on from.
    """
    runs = {name: _Runs(*pair, texts) for name, pair in models.items()}
    for number in range(rounds + 1):
        names = list(runs) if number % 2 else list(reversed(runs))  # none is always the first
        for passage in range(len(texts)):
            for name in names:
                runs[name].run(passage, clock)
        for run in runs.values():
            run.end_round(counted=number > 0)
        if number:
            on_round(number)
    first = next(iter(runs.values()))
    return {name: run.result(first) for name, run in runs.items()}


@dataclass
class _Runs:
    """The measurements of one model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[tuple[str, str]]
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    reading: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)

    def __post_init__(self):
        start, limit = start_of_text(self.tokenizer), position_limit(self.model)
        if not start:
            raise ValueError("tokenizer: wanted a bos or eos token to begin a text with, got neither")
        self.ids = []
        for parts in self.texts:
            read, written = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
            check_positions("".join(parts), len(start) + len(read) + len(written), limit, "data")
            self.ids.append([torch.tensor([x], device=self.model.device) for x in (start + read, written)])
        self.tokens = sum(part.shape[1] for pair in self.ids for part in pair) - len(start) * len(self.ids)
        self.few_logits = {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}
        self.cache: float | None = None

    def run(self, passage: int, clock: Callable[[], float]) -> None:
        """Read and write a passage."""
        read, written = self.ids[passage]
        begin = self._now(clock)
        found = self.model(input_ids=read, use_cache=True, **self.few_logits)
        between = self._now(clock)
        if self.cache is None:
            size = _cache_bytes(found.get("past_key_values"))
            self.cache = None if size is None else size / read.shape[1]
        for position in range(written.shape[1]):
            found.logits[:, -1].argmax().item()  # what choosing a token costs
            token = written[:, position : position + 1]
            found = self.model(input_ids=token, use_cache=True, **_state(self.model, found))
        self.seconds[0] += between - begin
        self.seconds[1] += self._now(clock) - between

    def _now(self, clock: Callable[[], float]) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return clock()

    def end_round(self, counted: bool) -> None:
        if counted:
            for speeds, part in ((self.reading, 0), (self.writing, 1)):
                speeds.append(sum(len(text[part]) for text in self.texts) / self.seconds[part])
        self.seconds = [0.0, 0.0]

    def result(self, first: "_Runs") -> Speed:
        characters = sum(len(part) for text in self.texts for part in text)
        return Speed(
            self.reading,
            self.writing,
            [mine / other for mine, other in zip(self.reading, first.reading, strict=True)],
            [mine / other for mine, other in zip(self.writing, first.writing, strict=True)],
            characters / self.tokens,
            _embedding_bytes(self.model),
            None if self.cache is None else self.cache * 1000 * self.tokens / characters,
        )


def _state(model: PreTrainedModel, found: ModelOutput) -> dict[str, Any]:
    """What a model remembers of the tokens that it has read, by the name that it takes and gives it under.

    Raises:
        ValueError: it gives back nothing to go on from.
    """
    for name in ("past_key_values", "cache_params", "state"):
        if found.get(name) is not None:
            return {name: found[name]}
    raise ValueError(
        f"speed: wanted a model that goes on from what it has read (past_key_values, cache_params or state), got "
        f"{type(model).__name__}, which gives back {', '.join(found)}"
    )


def _embedding_bytes(model: PreTrainedModel) -> int:
    tables = [x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None]
    return sum(table.nbytes for table in {table.data_ptr(): table for table in tables}.values())


def _cache_bytes(cache: object) -> int | None:
    layers = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in getattr(cache, "layers", ())]
    tensors = [x for pair in layers for x in pair if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors) if tensors else None
