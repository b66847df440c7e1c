"""Several initialisers side by side: what a new tokenizer costs before any training, and behind a short one."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.batches import Batch
from matt_fast.data.chunks import sides_of
from matt_fast.data.documents import read_documents
from matt_fast.data.parallel import read_pairs
from matt_fast.data.stream import AlignedBatches
from matt_fast.evaluation.bits_per_byte import evaluate
from matt_fast.initializers import InitReport, Method, Rows, check_init_head, initial_rows
from matt_fast.model.checkpoint_files import check_weights
from matt_fast.model.teacher import Teacher
from matt_fast.model.weight_values import check_values
from matt_fast.recipe import export
from matt_fast.recipe.arguments import check_arguments
from matt_fast.recipe.processes import check_alone
from matt_fast.support.checks import checked
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.support.own_state import own_state
from matt_fast.training.loop import freeze, train
from matt_fast.training.objectives import plan_ahead, trains_output
from matt_fast.training.options import TrainingOptions
from matt_fast.training.student import make_student


@dataclass(frozen=True)
class Initialised:
    """What one initialiser gave.

    Attributes:
        init: its name, or the path of ready rows.
        bits_per_byte: of the held-out text under the model with the new tokenizer, untrained.
        seconds: that making the rows took.
        memory: bytes in use at most while making them; of the accelerator if there is one, else of the process.
        report: where the rows came from.
        probed: bits per byte behind the probe's steps of training; None without a probe.
    """

    init: str
    bits_per_byte: float
    seconds: float
    memory: int
    report: InitReport
    probed: float | None = None


@checked
@own_state()
def compare_initializers(
    model: str | Path,
    tokenizer: str | Path,
    eval_data: str | Path,
    inits: Iterable[str | Path | Method],
    *,
    data: str | Path | None = None,
    init_head: str = "same",
    donor: str | Path | None = None,
    omp_k: int = 64,
    parallel: str | Path | None = None,
    untie: bool = False,
    eval_pieces: int = 40,
    probe: TrainingOptions | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    split: str = "train",
    text_field: str = "text",
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    device: str | None = None,
    on_original: Callable[[float], None] = lambda bits_per_byte: None,
    on_result: Callable[[Initialised], None] = lambda result: None,
    on_piece: Callable[[int], None] = lambda done: None,
    on_progress: Callable[[str, int, int], None] = lambda init, done, total: None,
) -> tuple[float, list[Initialised]]:
    """Initialise the same model for the same tokenizer in several ways and score each on the same text.

    Long because it documents every argument.

    Args:
        model, tokenizer: folders or hub names.
        data, donor, omp_k, parallel, init_head, untie, eval_data, eval_pieces, split,
            text_field, seed, trust_remote_code, allow_pickle: as in `transfer`.
        inits: what `transfer` takes as `init`.
        probe: train each start for the steps of these options, on `data`, at a third of the depth: figures before
            training do not tell which start is the better one behind it (arXiv 2608.03494).
        max_length, batch_size: of the probe, as in `transfer`.
        device: where to work, "cuda:1" for example; what accelerate finds if None.
        on_original: called with bits per byte of the original model.
        on_result: called with each result.
        on_piece: called with the number of pieces of text that are scored under the model at hand.
        on_progress: called with the initialiser, the rows that it has made, and their number; see `initial_rows`.

    Returns:
        Bits per byte of the original model, and the results in the order of `inits`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    arguments, inits = dict(locals()), list(inits)
    check_alone("inits", "a comparison")
    for init in inits:
        check_arguments(arguments | {"init": init})
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    device = Accelerator().device if device is None else torch.device(device)
    teacher = Teacher(model, untie=untie, **options)
    teacher.check_language_model("eval_data")
    check_values(teacher, check_weights(teacher), lambda what, done, total: None)
    if probe is not None and data is None:
        raise ValueError("data: wanted text to train on for the probe, got none")
    texts = None if data is None else read_documents(data, split=split, text_field=text_field)
    pairs = None if parallel is None else read_pairs(parallel)
    held_out = read_documents(eval_data, split=split, text_field=text_field)

    def bits(scored, its_tokenizer) -> float:
        scored.to(device)
        options = {"max_pieces": eval_pieces, "masked": teacher.masked, "on_piece": on_piece}
        return evaluate(scored, its_tokenizer, held_out, **options).bits_per_byte

    original = teacher.load(torch.float32)
    check_init_head(init_head, original)
    rows = len(original.get_input_embeddings().weight)
    vocabulary = VocabularyPair(teacher.load_tokenizer(), teacher.load_tokenizer(tokenizer), rows)
    baseline = bits(original, vocabulary.teacher)
    on_original(baseline)
    results = []
    for init in inits:
        reset_peak_memory(device)
        begin = time.perf_counter()
        given = {"texts": texts, "donor": donor, "omp_k": omp_k, "parallel": pairs, "init_head": init_head}
        given["on_progress"] = partial(on_progress, str(init))
        start = initial_rows(original, vocabulary, init, seed, **given, **options)
        seconds, memory = time.perf_counter() - begin, peak_memory(device)
        changed = teacher.load(torch.float32)
        export.replace_vocabulary(changed, start)
        found = Initialised(str(init), bits(changed, vocabulary.student), seconds, memory, start.report)
        if probe is not None:
            where = {"batch_size": batch_size, "seed": seed, "split": split, "text_field": text_field}
            batches = partial(_batches, data, vocabulary, max_length, packing=probe.packing, **where)
            export.replace_vocabulary(changed, _train(original.to(device), vocabulary, start, batches, probe, teacher))
            found = dataclasses.replace(found, probed=bits(changed, vocabulary.student))
        results.append(found)
        on_result(results[-1])
    return baseline, results


def _batches(data: str | Path, vocabulary: VocabularyPair, max_length: int, **options) -> Iterator[Batch]:
    """The batches that a transfer would train on."""
    return AlignedBatches(data, *sides_of(vocabulary, max_length), **options).in_background()


def _train(
    model: PreTrainedModel,
    vocabulary: VocabularyPair,
    start: Rows,
    batches: Callable[..., Iterator[Batch]],
    options: TrainingOptions,
    teacher: Teacher,
) -> Rows:
    """The rows behind a short training from `start`, shared ones as they are."""
    with_head = trains_output(options.objectives())
    trunk = model if with_head else teacher.trunk(model)
    freeze(trunk)
    student = make_student(trunk, vocabulary, start, True, options.objectives())
    n_layers = max(1, round(teacher.depth / 3))
    continuations = student.target and student.target.continuations
    batches = batches(finish=plan_ahead(trunk, n_layers, options, continuations))
    given = {"causal": not teacher.masked}
    train(trunk, trunk, student, batches, n_layers, options, Accelerator(), **given)
    batches.close()
    output = None if start.output is None else start.output if student.output is None else student.output.weight()
    return dataclasses.replace(start, input=student.input.weight(), output=output)
