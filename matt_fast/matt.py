"""The reference library's interface: a script written for it runs with `from matt_fast import MATT, MATTConfig`.

A thin layer over the recipe's own parts. What differs: documents are cut into chunks where the reference truncates,
tokens are matched by their bytes, frozen embeddings combine with `with_ntp`, and a mismatch is an error.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset, load_from_disk
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matt_fast.data import Batch, Chunk, Side, collate, make_chunks
from matt_fast.embeddings import EmbeddingTable
from matt_fast.head import Head, logit_rule
from matt_fast.matt_config import PRECISIONS, MATTConfig
from matt_fast.modeling.base import PreTrainedModelForAIM
from matt_fast.modeling.embeddings import PartlyFrozenEmbeddings
from matt_fast.objectives import Student
from matt_fast.options import TrainingOptions
from matt_fast.training import Progress, freeze, train
from matt_fast.vocabulary import match_tokens, special_affixes

logger = logging.getLogger(__name__)

DATA_VERSION = 1  # count up when prepared data changes: part of the cache's key
COLUMNS = ("teacher_ids", "student_ids", "teacher_segments", "student_segments")


class MATTOutput(torch.Tensor):
    """What `MATT.train` returns: the learned input embeddings, with the output embeddings beside them.

    It is the tensor of the input embeddings itself, so that both of the reference library's conventions work:
    `output.apply_to(model)`, and `model.get_input_embeddings().weight.data.copy_(output)`.

    Attributes:
        input_embeddings: [student rows, dim], on the CPU.
        output_embeddings: [student rows, dim], the head's; None unless trained with `with_ntp`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor

    def __new__(cls, input_embeddings: torch.Tensor, output_embeddings: torch.Tensor | None = None):
        return torch.Tensor._make_subclass(cls, input_embeddings.detach())

    def __init__(self, input_embeddings: torch.Tensor, output_embeddings: torch.Tensor | None = None):
        self.input_embeddings, self.output_embeddings = input_embeddings.detach(), output_embeddings

    def apply_to(self, model: PreTrainedModel) -> None:
        """Copy the learned embeddings into a whole model, in place.

        Raises:
            ValueError: one of the model's tables has another shape; nothing has been changed then.
        """
        tables = [("input", model.get_input_embeddings(), self.input_embeddings)]
        if self.output_embeddings is not None:
            tables.append(("output", model.get_output_embeddings(), self.output_embeddings))
        for name, module, rows in tables:
            if module.weight.shape != rows.shape:
                raise ValueError(
                    f"model: wanted {name} embeddings of shape {tuple(rows.shape)}, got {tuple(module.weight.shape)}; "
                    "resize_token_embeddings first"
                )
        with torch.no_grad():
            for _, module, rows in tables:
                module.weight.copy_(rows)


class MATT:
    """Model-Aware Tokenizer Transfer with the reference library's calls: prepare_dataset, then train.

    Args:
        config: see `MATTConfig`.
        teacher_tokenizer, student_tokenizer: fast tokenizers, the original one and the new one.

    Attributes:
        dataset_path: folder of the prepared data; None before `prepare_dataset`.

    Raises:
        TypeError: a tokenizer is not a fast one.
    """

    def __init__(
        self,
        config: MATTConfig,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ):
        for name, tokenizer in (("teacher_tokenizer", teacher_tokenizer), ("student_tokenizer", student_tokenizer)):
            if not getattr(tokenizer, "is_fast", False):
                raise TypeError(f"{name}: wanted a fast tokenizer, got {type(tokenizer).__name__}")
        self.config = config
        self.teacher_tokenizer, self.student_tokenizer = teacher_tokenizer, student_tokenizer
        self.dataset_path: str | None = None

    def prepare_dataset(
        self,
        dataset: Dataset,
        max_length: int,
        dataset_output_dir: str | Path | None = None,
        text_column_name: str = "text",
        force_reprocess: bool = False,
        batch_size: int = 1000,
        num_proc: int | None = None,
    ) -> None:
        """Tokenise with both tokenizers, align, cut into chunks, and keep the result on disk.

        What is kept is found again by the data, both tokenizers and the length; documents are cut at segment boundaries
        where the reference library truncates them.

        Args:
            dataset: documents, one a row.
            max_length: tokens of a chunk, at most, on either side.
            dataset_output_dir: folder to keep it in; the configuration's if None.
            text_column_name: the column that holds the text.
            force_reprocess: make it anew even if it is there.
            batch_size: documents that a process takes at a time.
            num_proc: processes; all cores if None.

        Raises:
            TypeError: `dataset` is not a `datasets.Dataset`.
            ValueError: no such column, no text, or a `max_length` that special tokens fill.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset: wanted a datasets.Dataset (not a stream or a dict), got {type(dataset).__name__}"
            )
        if text_column_name not in dataset.column_names:
            raise ValueError(
                f"text_column_name: wanted one of the columns {dataset.column_names}, got {text_column_name!r}"
            )
        key = [DATA_VERSION, dataset._fingerprint, text_column_name, max_length]
        for tokenizer in (self.teacher_tokenizer, self.student_tokenizer):
            key += [tokenizer.backend_tokenizer.to_str(), special_affixes(tokenizer)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        folder = Path(dataset_output_dir or self.config.dataset_output_dir) / digest
        if force_reprocess or not folder.exists():
            sides = tuple(
                Side(name, tokenizer, len(tokenizer), max_length)
                for name, tokenizer in (("teacher", self.teacher_tokenizer), ("student", self.student_tokenizer))
            )
            chunks = dataset.map(
                _chunk_columns,
                batched=True,
                batch_size=batch_size,
                num_proc=min(num_proc or os.cpu_count() or 1, max(1, len(dataset))),
                remove_columns=dataset.column_names,
                fn_kwargs={"sides": sides, "column": text_column_name},
                load_from_cache_file=False,
                desc="Aligning",
            )
            if len(chunks) == 0:
                raise ValueError(f"dataset: wanted text to train on, got none in {len(dataset)} rows")
            _save(chunks, folder)
        self.dataset_path = str(folder)

    def prepare_frozen_embeddings_mask(self) -> torch.Tensor:
        """[student tokens] bool: True where the teacher has the same token, byte for byte or by its role."""
        mask = torch.zeros(len(self.student_tokenizer), dtype=torch.bool)
        mask[list(match_tokens(self.student_tokenizer, self.teacher_tokenizer))] = True
        logger.info("%d of %d tokens are shared", int(mask.sum()), len(mask))
        return mask

    def train(self, teacher_model: PreTrainedModelForAIM, student_model: PreTrainedModelForAIM, **kwargs) -> MATTOutput:
        """Train the student's embeddings on the prepared data; `student_model` has them afterwards, too.

        Args:
            teacher_model, student_model: of the classes of `matt_fast.modeling`, with the same `n_layers`.
            **kwargs: the reference library hands them to Lightning's Trainer; there is none here, so none is accepted.

        Raises:
            RuntimeError: `prepare_dataset` was not called.
            TypeError: a model of another class, or any further argument.
            ValueError: models, configuration and data that do not fit together.
            FloatingPointError: the loss became NaN or infinite.
        """
        if self.dataset_path is None:
            raise RuntimeError(
                "prepare_dataset: wanted it to be called before train, e.g. matt.prepare_dataset(data, 512)"
            )
        if kwargs:
            raise TypeError(f"train: arguments for Lightning's Trainer have no meaning here, got {', '.join(kwargs)}")
        self._check_models(teacher_model, student_model)
        config = self.config
        set_seed(config.seed)
        accelerator = self._accelerator()
        data = load_from_disk(self.dataset_path).with_format("numpy")
        per_epoch = len(data) // accelerator.num_processes // config.batch_size // config.accumulate_grad_batches
        if per_epoch == 0:
            raise ValueError(
                f"batch_size: wanted at most the {len(data)} chunks of the data in a step of all processes, got "
                f"{config.batch_size} x {config.accumulate_grad_batches} x {accelerator.num_processes}"
            )
        steps = per_epoch * config.max_epochs
        options = TrainingOptions(
            objective=config.aim_impl + ("+ntp" if config.with_ntp else ""),
            steps=steps if config.max_steps == -1 else min(steps, config.max_steps),
            lr=config.lr,
            warmup_steps=config.num_warmup_steps,
            decay_steps=config.num_decay_steps,
            accumulation=config.accumulate_grad_batches,
            max_grad_norm=config.gradient_clip_val or None,
            metric=config.loss,
        )
        for side in (teacher_model, student_model):
            side.to(accelerator.device)
            for parameter in side.parameters():  # not the buffers: rotary frequencies stay float32
                parameter.data = parameter.data.to(PRECISIONS[config.precision])
            freeze(side.model)
        student = _student(student_model)
        embedding = student_model.get_input_embeddings()
        keeper = _Checkpoints(config, student, accelerator)

        def on_step(progress: Progress) -> None:
            if progress.step % config.log_every_n_steps == 0 or progress.step == options.steps:
                logger.info("step %d: loss %.4g %s", progress.step, progress.loss, progress.parts)
                accelerator.log({"loss": progress.loss, **progress.parts}, step=progress.step)
            if progress.step % config.save_every_n_steps == 0 or progress.step == options.steps:
                keeper.save(progress)

        if isinstance(embedding, PartlyFrozenEmbeddings):
            student_model.set_input_embeddings(embedding.without_rows())  # rows come from the table while training
        try:
            batches = _batches(data, config, accelerator)
            train(
                teacher_model.model,
                student_model.model,
                student,
                batches,
                student_model.n_layers,
                options,
                accelerator,
                on_step,
            )
        finally:
            student_model.set_input_embeddings(embedding)
            _write_back(student, student_model)
        accelerator.end_training()
        output = student.tables[-1].weight().cpu() if config.with_ntp else None
        return MATTOutput(student.input.weight().cpu(), output)

    def _check_models(self, teacher_model, student_model) -> None:
        for name, model in (("teacher_model", teacher_model), ("student_model", student_model)):
            if not isinstance(model, PreTrainedModelForAIM):
                raise TypeError(f"{name}: wanted a PreTrainedModelForAIM, got {type(model).__name__}")
        if teacher_model.model is student_model.model:
            raise ValueError("student_model: wanted a model of its own, got the teacher's")
        if teacher_model.n_layers != student_model.n_layers:
            raise ValueError(
                f"n_layers: wanted the same for both models, got {teacher_model.n_layers} and {student_model.n_layers}"
            )
        if self.config.with_ntp != student_model.with_ntp:
            raise ValueError(
                f"with_ntp: wanted the same in MATTConfig and in student_model, got {self.config.with_ntp} and "
                f"{student_model.with_ntp}"
            )
        for name, model, tokenizer in (
            ("teacher_model", teacher_model, self.teacher_tokenizer),
            ("student_model", student_model, self.student_tokenizer),
        ):
            embedding = model.get_input_embeddings()
            rows = embedding.vocab_size if isinstance(embedding, PartlyFrozenEmbeddings) else len(embedding.weight)
            if rows < len(tokenizer):
                raise ValueError(
                    f"{name}: wanted at least {len(tokenizer)} embedding rows for its tokenizer, got {rows}; resize "
                    "and initialise them first (matt_fast.initialize, or a model folder made for the tokenizer)"
                )
        self._warn_if_not_initialised(teacher_model, student_model)

    def _warn_if_not_initialised(self, teacher_model, student_model) -> None:
        """Frozen rows are never corrected: they must be the teacher's rows of the same tokens."""
        embedding = student_model.get_input_embeddings()
        if not isinstance(embedding, PartlyFrozenEmbeddings):
            return
        matches = match_tokens(self.student_tokenizer, self.teacher_tokenizer)
        shared = [i for i in matches if bool(embedding.frozen_mask[i])]
        theirs = teacher_model.get_input_embeddings().weight[[matches[i].teacher_id for i in shared]]
        mine = embedding.frozen_embeddings.weight[embedding.places[shared]]
        different = int((mine.float() != theirs.float().to(mine.device)).any(1).sum())
        if different:
            logger.warning(
                "%d of %d frozen rows of student_model are not the teacher's rows of the same tokens: was it "
                "initialised for the new tokenizer (matt_fast.initialize)? Frozen rows stay as they are.",
                different,
                len(shared),
            )

    def _accelerator(self) -> Accelerator:
        config = self.config
        if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"accelerator: wanted a CUDA device for {config.accelerator!r}, got none; use 'auto' or 'cpu'"
            )
        if config.use_wandb:
            try:
                import wandb  # noqa: F401
            except ImportError as error:
                raise ImportError("use_wandb: wandb is missing: pip install wandb") from error
        accelerator = Accelerator(cpu=config.accelerator == "cpu", log_with="wandb" if config.use_wandb else None)
        if config.devices not in (-1, "auto", accelerator.num_processes):
            raise ValueError(
                f"devices: wanted the {accelerator.num_processes} processes that were started, got {config.devices}; "
                "start as many with accelerate launch or torchrun"
            )
        if config.use_wandb:
            os.makedirs(config.wandb_output_dir, exist_ok=True)
            wandb_options = {"wandb": {"dir": config.wandb_output_dir}}
            accelerator.init_trackers(config.wandb_project, asdict(config), wandb_options)
        return accelerator


def _chunk_columns(rows: dict[str, list], sides: tuple[Side, Side], column: str) -> dict[str, list]:
    chunks = list(make_chunks(rows[column], *sides, Counter()))
    return {name: [getattr(chunk, name).astype(np.int32) for chunk in chunks] for name in COLUMNS}


def _save(chunks: Dataset, folder: Path) -> None:
    """Write to a temporary name, then rename: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        chunks.save_to_disk(temporary / "data")
        if folder.exists():
            folder.rename(temporary / "old")
        (temporary / "data").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(data: Dataset, config: MATTConfig, accelerator: Accelerator) -> Iterator[Batch]:
    """Batches of this process, pass after pass over the data, each in an order of its own."""

    def make(rows: list[dict]) -> Batch:
        chunks = [Chunk(*(row[name].astype(np.int64) for name in COLUMNS)) for row in rows]
        return collate(chunks, Counter(), config.pad_to_multiple_of)

    for epoch in range(config.max_epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
        mine = order[: len(order) // accelerator.num_processes * accelerator.num_processes]
        mine = mine[accelerator.process_index :: accelerator.num_processes]
        yield from DataLoader(
            data,
            config.batch_size,
            sampler=mine.tolist(),
            collate_fn=make,
            num_workers=config.num_workers,
            drop_last=True,
        )


def _student(model: PreTrainedModelForAIM) -> Student:
    """The student's rows as tables."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PartlyFrozenEmbeddings):
        weight = embedding.to_embeddings().weight.detach()
        frozen_rows = torch.arange(len(weight), device=weight.device).where(embedding.frozen_mask, -1)
    else:
        weight = embedding.weight.detach()
        frozen_rows = torch.full((len(weight),), -1, device=weight.device)
    table = EmbeddingTable(weight, frozen_rows, weight)
    if not model.with_ntp:
        return Student(table)
    head = model.get_output_embeddings()
    output = None if model.tied else EmbeddingTable(head.weight, frozen_rows, head.weight.detach())
    rule = logit_rule(model.model)
    return Student(table, output, Head((output or table).weight(), getattr(head, "bias", None), **rule))


@torch.no_grad()
def _write_back(student: Student, model: PreTrainedModelForAIM) -> None:
    """Put the tables' rows into the model's modules."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PartlyFrozenEmbeddings):
        embedding.active_embeddings.weight.copy_(student.input.trainable)
    else:
        embedding.weight.copy_(student.input.weight())
    if model.with_ntp:
        model.get_output_embeddings().weight.copy_(student.tables[-1].weight())


class _Checkpoints:
    """The trained rows on disk, every so many steps: the best by loss, and the last."""

    def __init__(self, config: MATTConfig, student: Student, accelerator: Accelerator):
        self.folder, self.keep = Path(config.checkpoint_output_dir), config.save_top_k
        self.student, self.accelerator = student, accelerator
        self.kept: list[tuple[float, Path]] = []

    def save(self, progress: Progress) -> None:
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: table.weight().cpu().contiguous()
            for name, table in zip(("input_embeddings", "output_embeddings"), self.student.tables, strict=False)
        }
        names = [self.folder / "last.safetensors"]
        if self.keep != 0:
            names.append(self.folder / f"step{progress.step}_loss{progress.loss:.4g}.safetensors")
            self.kept.append((progress.loss, names[-1]))
        for name in names:
            temporary = name.with_name(f".{name.name}")
            save_file(tensors, temporary)
            os.replace(temporary, name)
        while 0 < self.keep < len(self.kept):
            worst = max(self.kept)
            worst[1].unlink(missing_ok=True)
            self.kept.remove(worst)
