"""What a transfer will take, from configuration files and tokenizers alone: memory by part, work, and what fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.model.positions import position_limit
from matt_fast.model.precision import DTYPES
from matt_fast.model.teacher import Teacher
from matt_fast.planning.arguments import check_plan
from matt_fast.planning.processes import BANDWIDTH, Layout, layouts
from matt_fast.planning.simulation import Step, Vocabulary, simulate
from matt_fast.support.checks import ROWS, checked
from matt_fast.support.own_state import own_state
from matt_fast.support.units import GIB
from matt_fast.training.frozen import outline_frozen
from matt_fast.training.loop import freeze
from matt_fast.training.objectives import trains_output
from matt_fast.training.options import HealingOptions, TrainingOptions, options_of_healing

SEARCHED = 1 << 19  # tokens of a batch: what is larger is not looked for
CLOSE_ENOUGH = 64  # parts of the longest sequence that are left unsearched

Change = tuple[list[str], dict]  # options of the command line, and what they change of a step


@dataclass(frozen=True)
class Remedy:
    """Options of the command line, the peak in bytes that a step has with them, and whether that fits."""

    options: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a training step will take.

    Attributes:
        n_layers: the target layer, counted from 1.
        rows, trainable: of the new vocabulary, and those of them that are trained.
        step: of rows alone: peak memory by part, and multiplications and additions; None where there is none (`steps`
            of `training` is 0).
        longest: tokens of a row that fit at this batch size, to within 2%, 0 if none do; None without `vram`. Batches
            of more than half a million tokens are not looked for, as for `largest_batch`.
        largest_batch: rows that fit at this length, likewise.
        remedies: if the step does not fit, what to turn on, and what it then takes.
        healing: a step of rows and layers together; None where none was asked for.
        layouts: of several processes, in the step of rows alone; none of one process.
    """

    n_layers: int
    rows: int
    trainable: int
    step: Step | None
    longest: int | None = None
    largest_batch: int | None = None
    remedies: tuple[Remedy, ...] = ()
    healing: Step | None = None
    layouts: tuple[Layout, ...] = ()

    def layout(self, vram: int) -> Layout | None:
        """The layout to take, which sends least of those that fit; None if none does."""
        return min((x for x in self.layouts if x.step.peak <= vram), key=lambda x: x.sent, default=None)


@checked
@own_state()
def plan(
    model: str | Path,
    tokenizer: str | Path,
    *,
    length: int = 512,
    batch_size: int = 4,
    n_layers: int | None = None,
    training: TrainingOptions | None = None,
    healing: HealingOptions | None = None,
    precision: str = "bf16",
    freeze_shared: bool = True,
    untie: bool = False,
    device: str = "cuda",
    vram: int | None = None,
    processes: int = 1,
    bandwidth: float = BANDWIDTH,
    trust_remote_code: bool = False,
) -> Plan:
    """Predict what a training step of `transfer` will take; no weights are read, and no data.

    Long because it documents every argument.

    Counted are the tensors in use at once where both sides have full rows of one document and every token has a row of
    its own: real batches take a little less, packed ones about as much, or less. What a device's driver and libraries
    keep for themselves comes on top, as does what the allocator cannot use (on a GPU together 1 to 2 GiB).

    Args:
        model, tokenizer: folders or hub names; of the model its configuration and tokenizer are read.
        length, batch_size: tokens of a chunk on either side, and chunks.
        n_layers: the target layer; a third of the depth if None.
        training: see `TrainingOptions`; with `steps` 0 a step of healing is predicted alone.
        healing: see `HealingOptions`; a step of it is predicted beside, and has to fit too.
        precision: of the frozen weights: "no" (float32) or "bf16".
        freeze_shared, untie: as in `transfer`.
        device: "cuda" or "cpu": where backend "auto" of the loss will run.
        vram: bytes that may be in use; if given, what fits into them is searched.
        processes: that train together, each with batches of its own; all figures are of one of them.
        bandwidth: 10⁹ bytes that a process sends to the others in a second.
        trust_remote_code: let the repositories run code of their own.

    Raises:
        ValueError: an argument does not fit; `length` is more than the model's positions; `vram` is too small for a
            single token.
    """
    check_plan(locals())
    source = Teacher(model, untie=untie, trust_remote_code=trust_remote_code)
    rows = len(cast(torch.Tensor, source.outline(DTYPES[precision], 1).get_input_embeddings().weight))
    pair = VocabularyPair(source.load_tokenizer(), source.load_tokenizer(tokenizer), rows)
    vocabulary = Vocabulary(pair.rows, pair.rows - (len(pair.matches) if freeze_shared else 0))
    return plan_step(
        source, vocabulary, training or TrainingOptions(), length=length, batch_size=batch_size, n_layers=n_layers,
        precision=precision, device=device, healing=healing, vram=vram, processes=processes, bandwidth=bandwidth,
    )  # fmt: skip


def plan_step(
    source: Teacher,
    vocabulary: Vocabulary,
    training: TrainingOptions,
    *,
    length: int,
    batch_size: int,
    n_layers: int | None,
    precision: str,
    device: str,
    healing: HealingOptions | None = None,
    vram: int | None = None,
    processes: int = 1,
    bandwidth: float = BANDWIDTH,
) -> Plan:
    """`plan`, for a model and a vocabulary that have been looked at already.

    Raises:
        ValueError: what `plan` raises; NeedsWeightsError where a step cannot be simulated without them.
    """
    n_layers = max(1, round(source.depth / 3)) if n_layers is None else n_layers
    if not 1 <= n_layers <= source.depth:
        raise ValueError(f"n_layers: wanted 1 to {source.depth} for this model, got {n_layers}")
    if training.backend == "auto":
        on_gpu = device == "cuda" and find_spec("triton") is not None
        training = replace(training, backend="triton" if on_gpu else "torch")
    with_head = training.steps > 0 and trains_output(training.objectives())
    if with_head and source.masked:
        raise ValueError(
            f"objective: ntp and boundary-head want a causal language model, but {str(source.model)!r} is masked"
        )
    if with_head:
        source.check_language_model(f"objective {training.objective!r}")
    outline = _outlines(source, None if with_head else n_layers, device)
    smallest = outline(precision, None, None, 1)
    limit = position_limit(smallest)
    if limit is not None and length > limit:
        raise ValueError(f"length: wanted at most the model's {limit} positions, got {length}")

    def run(length=length, batch_size=batch_size, precision=precision, **changes) -> Step:
        options = replace(training, **changes)
        model = outline(precision, options.quantization, options.offload, processes if options.shard else 1)
        return simulate(model, vocabulary, length, batch_size, n_layers, options, processes=processes)

    found = Plan(n_layers, vocabulary.rows, vocabulary.trainable, run() if training.steps else None)
    if processes > 1 and training.steps:
        every = layouts(
            lambda chosen: run(shard=chosen.shard),
            smallest,
            vocabulary,
            training,
            tokens=length * batch_size,
            n_layers=n_layers,
            processes=processes,
            bandwidth=bandwidth,
        )
        found = replace(found, layouts=every)

    whole_outline = _outlines(source, None, device)

    def heal(chosen: HealingOptions, length=length, batch_size=batch_size, precision=precision, **changes) -> Step:
        options = options_of_healing(replace(training, **changes), chosen)
        whole = whole_outline(precision, options.quantization, None, processes if options.shard else 1)
        return simulate(whole, vocabulary, length, batch_size, n_layers, options, chosen, processes)

    def larger(**changes) -> Step:
        """Of the steps of a run the one that takes most."""
        steps = [run(**changes)] if training.steps else []
        steps += [] if healing is None else [heal(healing, **changes)]
        return max(steps, key=lambda step: step.peak)

    if healing is not None:
        source.check_language_model("heal")
        found = replace(found, healing=heal(healing))
    if vram is None:
        return found
    first = partial(_first_changes, training, precision, batch_size)
    last = _last_resorts(training, device, healing)
    return _with_what_fits(found, larger, vram, length, batch_size, limit, first, last)


def _with_what_fits(
    found: Plan,
    larger: Callable[..., Step],
    vram: int,
    length: int,
    batch_size: int,
    limit: int | None,
    first: Callable[[int], list[Change]],
    last: list[Change],
) -> Plan:
    """The plan with what fits into `vram` of the steps that `larger` gives, and what to turn on where they do not."""
    _check_single_token(larger, last, vram)
    most = limit or max(length, SEARCHED // batch_size)
    longest = _largest(lambda n: larger(length=n).peak, vram, most, CLOSE_ENOUGH)
    most = min(ROWS, max(batch_size, SEARCHED // length))
    largest_batch = _largest(lambda n: larger(batch_size=n).peak, vram, most, CLOSE_ENOUGH)
    found = replace(found, longest=longest, largest_batch=largest_batch)
    if larger().peak <= vram:
        return found
    return replace(found, remedies=_remedies(larger, first(largest_batch), last, longest, vram))


def _outlines(source: Teacher, n_layers: int | None, device: str) -> Callable[..., PreTrainedModel]:
    """A function that gives the frozen model on the meta device, with all layers and head if `n_layers` is None."""

    @cache
    def outline(precision: str, quantization: str | None, offload: str | None, spread: int) -> PreTrainedModel:
        loaded = source.outline(DTYPES[precision], n_layers)
        loaded = loaded if n_layers is None else source.trunk(loaded)
        freeze(loaded)
        outline_frozen(loaded, quantization, offload, device, spread)
        return loaded

    return outline


def _last_resorts(training: TrainingOptions, device: str, healing: HealingOptions | None) -> list[Change]:
    """Of what can be turned on, the one that costs accuracy and the one that costs time; one at a time.

    Healing does not go with offloaded layers, and only LoRA with quantised ones.
    """
    if training.quantization is not None or training.offload is not None or training.compile or training.shard:
        return []
    found: list[Change] = []
    if healing is None or healing.method == "lora":
        found.append((["--quantization 4bit"], {"quantization": "4bit"}))
    if "aim-all-layers" not in training.objectives() and healing is None:
        place = "cpu" if device == "cuda" else "disk"
        names = [] if training.checkpointing else ["--checkpointing"]
        found.append(([*names, f"--offload {place}"], {"checkpointing": True, "offload": place}))
    return found


def _first_changes(training: TrainingOptions, precision: str, batch_size: int, largest_batch: int) -> list[Change]:
    """What else can be turned on, the result being about the same."""
    found: list[Change] = []
    if batch_size > 1:
        smaller = max(1, largest_batch)
        accumulation = training.accumulation * -(-batch_size // smaller)
        name = f"--batch-size {smaller} --accumulation {accumulation}"
        found.append(([name], {"batch_size": smaller, "accumulation": accumulation}))
    if not training.checkpointing and "aim-all-layers" not in training.objectives():
        found.append((["--checkpointing"], {"checkpointing": True}))
    if precision == "no":
        found.append((["--precision bf16"], {"precision": "bf16"}))
    return found


def _check_single_token(run: Callable[..., Step], last_resorts: list[Change], vram: int) -> None:
    least = run(length=1, batch_size=1)
    if least.peak > vram:
        peaks = ((" ".join(names), run(length=1, batch_size=1, **options).peak) for names, options in last_resorts)
        raise ValueError(
            f"vram: wanted at least {least.peak / GIB:.2f} GiB, which a single token takes "
            f"({least.parts['frozen weights'] / GIB:.2f} of them for frozen weights), got {vram / GIB:.2f}"
            + "".join(f"; with {name} it takes {peak / GIB:.2f}" for name, peak in peaks)
        )


def _remedies(
    run: Callable[..., Step], first: list[Change], last_resorts: list[Change], longest: int, vram: int
) -> tuple[Remedy, ...]:
    """Each change on its own, and several together where none is enough; shorter chunks at last."""
    single = [[x] for x in (*first, *last_resorts)]
    together = [first] if len(first) > 1 else []
    together += [[*first, last] for last in last_resorts if first]
    peaks: list[tuple[str, int]] = []
    for choice in [*single, *together]:
        if choice in together and any(peak <= vram for _, peak in peaks):
            break
        names = dict.fromkeys(name for names, _ in choice for name in names)
        peaks.append((" ".join(names), run(**{key: x for _, options in choice for key, x in options.items()}).peak))
    if longest:
        peaks.append((f"--max-length {longest}", run(length=longest).peak))
    return tuple(Remedy(name, peak, peak <= vram) for name, peak in peaks)


def _largest(peak: Callable[[int], int], allowed: int, limit: int, parts: int) -> int:
    """The largest count up to `limit` whose peak is allowed, to within one of `parts` parts; 0 if none is.

    Memory is nearly a line in the count: a try is where the line through the two before meets what is allowed, a bit to
    the side that is still open. Every third halves what is left, for what is no line.
    """
    low, high, before, count = 0, limit + 1, (0, 0), 1  # low fits, high does not
    tries = 0
    while high - low > max(1, low // parts):
        found, tries = peak(count), tries + 1
        low, high = (count, high) if found <= allowed else (low, count)
        slope = (found - before[1]) / (count - before[0])
        before = count, found
        halfway = (low + high) // 2 if high <= limit else min(16 * low, limit)
        if slope <= 0 or tries % 3 == 0:
            count = halfway
            continue
        meeting = count + (allowed - found) / slope
        aside = max(1.0, meeting / (3 * parts))
        wanted = min(round(meeting - aside if count == high else meeting + aside), halfway if high > limit else high)
        count = wanted if low < wanted < high else halfway
    return low
