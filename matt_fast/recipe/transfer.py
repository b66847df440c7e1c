"""The recipe: from a model and a tokenizer to a folder that loads and generates (paper §3.5)."""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side
from matt_fast.data.documents import read_documents
from matt_fast.data.parallel import read_pairs
from matt_fast.data.prepared import prepare_once
from matt_fast.data.stream import AlignedBatches
from matt_fast.evaluation.bits_per_byte import Evaluation, evaluate
from matt_fast.initializers import Method, Rows, initial_rows, needs_whole_model
from matt_fast.model.embeddings import EmbeddingTable
from matt_fast.model.head import Head, logit_rule
from matt_fast.model.teacher import Teacher, only_errors
from matt_fast.recipe import export
from matt_fast.recipe.card import model_card
from matt_fast.recipe.result import TransferResult
from matt_fast.support.memory import peak_memory, reset_peak_memory
from matt_fast.training.frozen import check_frozen, load_frozen
from matt_fast.training.loop import Progress, freeze, train
from matt_fast.training.objectives import Student, plan_ahead, trains_input, trains_output
from matt_fast.training.options import TrainingOptions

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


def transfer(
    model: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    data: str | Path,
    output: str | Path,
    *,
    init: str | Path | Method = "mean",
    init_head: str = "same",
    donor: str | Path | None = None,
    parallel: str | Path | None = None,
    freeze_shared: bool = True,
    n_layers: int | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    training: TrainingOptions | None = None,
    precision: str = "auto",
    split: str = "train",
    text_field: str = "text",
    data_cache: str | Path | None = None,
    eval_data: str | Path | None = None,
    eval_pieces: int = 40,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_initialise: Callable[[int, int], None] | None = None,
) -> TransferResult:
    """Give a pretrained language model a new tokenizer and train the embeddings of its new tokens.

    Args:
        model: folder or hub name of the teacher; its tokenizer is loaded from the same place.
        tokenizer: folder or hub name of the new tokenizer, or a fast tokenizer.
        data: text to train on, see `read_documents`.
        output: folder to write; it must be new or empty. Nothing is left there if the work fails.
        init: how new rows start: a method's name, a function, or ready embeddings; see `initial_rows`.
        init_head: how new output rows start, "same" or "boundary"; see `initial_rows`.
        donor: model with the new vocabulary, for init "omp".
        parallel: file of texts and their translations, see `read_pairs`; for init "wechsel" and "transtokenizers".
        freeze_shared: keep the rows of tokens that the teacher has, byte for byte, as they are.
        n_layers: layers to run; the loss is at the last one's attention. A third of the depth if None.
        max_length: tokens of a training chunk, on either side. Longer documents are cut, not truncated.
        batch_size: rows per batch and process; a row is one chunk, or `max_length` tokens of them with packing.
        training: steps, learning rate, loss; see `TrainingOptions`.
        precision: of the frozen weights: "no" (float32), "bf16", or "auto" (what accelerate is configured with, else
            bf16 on a GPU that has it). Trained rows and their optimiser are always float32.
        split, text_field: of the data.
        data_cache: folder in which chunks are prepared before training, once for this data, tokenizers and length, and
            found again; they are made during training if None.
        eval_data: held-out text; if given, bits per byte are measured before, after initialisation, after training.
        eval_pieces: pieces of 2,048 bytes of it to score, at most.
        seed: of initialisation and order of the data.
        trust_remote_code: let the model's or tokenizer's repository run code of its own.
        allow_pickle: accept weights that are not safetensors; loading a pickle can run code.
        on_step: called with the progress after each training step.
        on_stage: called with the name of each stage of the work as it begins.
        on_initialise: `on_progress` of `initial_rows`.

    Raises:
        FileExistsError: `output` is not empty.
        TypeError, ValueError: an argument does not fit; the message names it.
        FloatingPointError: the loss became NaN or infinite.
    """
    training = training or TrainingOptions()
    export.check_output(output)
    stages = _Stages(on_stage)
    set_seed(seed)
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"precision: wanted 'auto', 'no' (float32) or 'bf16', got {precision!r}")
    accelerator = Accelerator(mixed_precision=None if precision == "auto" else precision)
    dtype = _dtype(accelerator, precision)
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    teacher = Teacher(model, **options)
    check_frozen(teacher, training, accelerator.device)
    n_layers = max(1, round(teacher.depth / 3)) if n_layers is None else n_layers
    held_out = None if eval_data is None else read_documents(eval_data, split=split, text_field=text_field)
    pairs = None if parallel is None else read_pairs(parallel)
    evaluations: dict[str, Evaluation] = {}

    def measure(name: str, measured: PreTrainedModel, its_tokenizer: PreTrainedTokenizerBase) -> None:
        stages.begin(f"evaluation ({name})")
        measured.to(accelerator.device).eval()
        evaluations[name] = evaluate(measured, its_tokenizer, held_out, max_pieces=eval_pieces, masked=teacher.masked)

    if not 1 <= n_layers <= teacher.depth:
        raise ValueError(f"n_layers: wanted 1 to {teacher.depth} for this model, got {n_layers}")
    with_head = trains_output(training.objectives())
    if with_head and teacher.masked:
        raise ValueError(
            "objective: ntp and boundary-head want a causal language model, but "
            f"{str(model)!r} is a masked one; got {training.objective!r}"
        )

    def frozen(depth: int | None) -> PreTrainedModel:
        return load_frozen(teacher, dtype, depth, training, accelerator.device)

    placed = training.quantization is not None or training.offload is not None
    stages.begin("vocabulary")
    trunk = frozen(None if with_head else n_layers)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)  # it may get the teacher's chat template
    else:
        tokenizer = teacher.load_tokenizer(tokenizer)
    vocabulary = VocabularyPair(teacher.load_tokenizer(), tokenizer, len(trunk.get_input_embeddings().weight))

    stages.begin("initialisation")
    texts = read_documents(data, split=split, text_field=text_field)
    start_from = trunk
    if needs_whole_model(init, init_head):
        start_from = trunk if with_head else frozen(None)
        start_from = start_from if placed else start_from.to(accelerator.device)
    given = {"texts": texts, "donor": donor, "parallel": pairs, "init_head": init_head}
    given["on_progress"] = on_initialise
    start = initial_rows(start_from, vocabulary, init, seed, **given, **options)
    del start_from
    if start.output is not None and not with_head:
        warnings.warn(
            "the model's output head is not tied to its input embedding: its new rows are initialised but not trained, "
            f"since the objective {training.objective!r} reaches input embeddings only (paper, appendix A); "
            "add boundary-head or ntp to it",
            stacklevel=2,
        )
    if start.output is not None and not trains_input(training.objectives()):
        warnings.warn(
            "the model's output head is not tied to its input embedding: new input rows are initialised but not "
            f"trained, since the objective {training.objective!r} reaches output rows only; add token-distillation or "
            "aim to it",
            stacklevel=2,
        )
    if held_out is not None and accelerator.is_main_process:
        full = teacher.load(dtype)
        measure("original", full, vocabulary.teacher)
        export.replace_vocabulary(full, start)
        measure("initialised", full, vocabulary.student)
        del full

    sides = (
        Side("teacher", vocabulary.teacher, vocabulary.teacher_rows, max_length),
        Side("student", vocabulary.student, vocabulary.rows, max_length),
    )
    prepared = None
    if data_cache is not None:
        stages.begin("data")
        with accelerator.local_main_process_first():  # the others find it made
            prepared = prepare_once(data_cache, data, *sides, split=split, text_field=text_field)

    stages.begin("training")
    memory_before = peak_memory(accelerator.device)
    reset_peak_memory(accelerator.device)
    trunk = trunk if with_head else teacher.trunk(trunk)
    trunk = trunk if placed else trunk.to(accelerator.device)
    freeze(trunk)
    student = make_student(trunk, vocabulary, start, freeze_shared, with_head)
    stream = AlignedBatches(
        data,
        *sides,
        batch_size=batch_size,
        seed=seed,
        split=split,
        text_field=text_field,
        prepared=prepared,
        packing=training.packing,
        finish=plan_ahead(trunk, n_layers, training),
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    batches = stream.in_background()
    progress, seen = train(
        trunk, trunk, student, batches, n_layers, training, accelerator, on_step, causal=not teacher.masked
    )
    batches.close()
    seen = accelerator.reduce(seen.to(accelerator.device), reduction="sum").cpu()
    result = TransferResult(
        output=Path(output),
        n_layers=n_layers,
        shared=len(vocabulary.matches),
        new=len(vocabulary.tokens) - len(vocabulary.matches),
        unspelled=len(vocabulary.tokens) - len(vocabulary.matches) - len(vocabulary.subtokens),
        report=start.report,
        trainable=len(student.input.trainable_ids),
        seen=int((seen[student.input.trainable_ids.cpu()] > 0).sum()),
        progress=progress,
        evaluations=evaluations,
        seconds=stages.seconds,
        training_memory=peak_memory(accelerator.device),
        peak_memory=memory_before,
    )
    head_rows = start.output if student.output is None else student.output.weight().cpu()
    trained = Rows(student.input.weight().cpu(), head_rows, start.output_bias)
    start_name = getattr(init, "__name__", "function") if callable(init) else str(init)
    is_trainable = (student.input.frozen_from < 0).tolist()
    del trunk, student

    if accelerator.is_main_process:
        stages.begin("writing")
        with export.new_folder(output) as folder:
            full = teacher.load("auto")
            export.replace_vocabulary(full, trained)
            export.update_special_ids(full, vocabulary)
            export.keep_chat_template(vocabulary.student, vocabulary.teacher)
            with only_errors():
                full.save_pretrained(folder)
            vocabulary.student.save_pretrained(folder)
            export.write_provenance(
                folder / "token_provenance.jsonl", vocabulary, start_name, start.report, is_trainable, seen.tolist()
            )
            del full
            if held_out is not None:
                written = teacher.load_result(folder, dtype)
                measure("trained", written, vocabulary.student)
                del written
            stages.end()
            result.peak_memory = max(memory_before, peak_memory(accelerator.device))
            card = model_card(result, model, data, start_name, freeze_shared, training)
            (folder / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
    return result


def _dtype(accelerator: Accelerator, precision: str) -> torch.dtype:
    chosen = accelerator.mixed_precision
    if chosen not in DTYPES:
        raise ValueError(
            f"precision: wanted 'no' or 'bf16' (the gradients of the AIM loss are too small for fp16 and below), but "
            f"accelerate is configured with {chosen!r}"
        )
    on_cuda = accelerator.device.type == "cuda"
    if precision == "auto" and chosen == "no" and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        chosen = "bf16"
    return DTYPES[chosen]


def make_student(
    trunk: PreTrainedModel, vocabulary: VocabularyPair, start: Rows, freeze_shared: bool, with_head: bool
) -> Student:
    """The student's vocabulary over the teacher's; shared tokens are frozen or start from the teacher's rows.

    Args:
        trunk: the frozen model, on its device; a causal language model if `with_head`.
        vocabulary, start: from `VocabularyPair` and `initial_rows`.
        freeze_shared: whether rows of shared tokens stay as they are, in both tables.
        with_head: whether the output side is trained too.
    """
    frozen_from = torch.full((vocabulary.rows,), -1)
    if freeze_shared:
        for student_id, match in vocabulary.matches.items():
            frozen_from[student_id] = match.teacher_id
    table = EmbeddingTable(trunk.get_input_embeddings().weight, frozen_from, start.input)
    if not with_head:
        return Student(table)
    output = None
    if start.output is not None:
        output = EmbeddingTable(trunk.get_output_embeddings().weight, frozen_from, start.output)
    weight = (table if output is None else output).weight()
    bias = None if start.output_bias is None else start.output_bias.to(weight)
    return Student(table, output, Head(weight, bias, **logit_rule(trunk)))


@dataclass
class _Stages:
    """Names and times the stages of the work."""

    on_stage: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    _name: str | None = None
    _since: float = 0.0

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._since = name, time.perf_counter()
        self.on_stage(name)

    def end(self) -> None:
        if self._name is not None:
            self.seconds[self._name] = time.perf_counter() - self._since
        self._name = None
