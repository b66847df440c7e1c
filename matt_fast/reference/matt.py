"""The reference library's interface: a script written for it runs with `from matt_fast import MATT, MATTConfig`.

A thin layer over the recipe's own parts. What differs: documents are cut into chunks where the reference truncates,
tokens are matched by their bytes, frozen embeddings combine with `with_ntp`, and a mismatch is an error.
"""

import json
import logging
import os
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import Dataset, load_from_disk
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from matt_fast.alignment.vocabulary import check_constant, check_fast, match_tokens, token_bytes, vocabulary_rows
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.data.chunks import Side
from matt_fast.data.documents import check_text_column
from matt_fast.data.prepared import HIGHEST_IDS, data_key, find_damage, prepare
from matt_fast.modeling.base import PreTrainedModelForAIM
from matt_fast.modeling.embeddings import PartlyFrozenEmbeddings
from matt_fast.reference.checkpoints import Checkpoints
from matt_fast.reference.config import PRECISIONS, MATTConfig, training_options
from matt_fast.reference.data import batches
from matt_fast.reference.figures import begin_figures, figures_at_end, flops_of_a_chunk, losses_logged
from matt_fast.reference.output import MATTOutput
from matt_fast.reference.rows import input_table, place, student_tables, write_back
from matt_fast.support.checks import check_type
from matt_fast.support.installing import packages_line
from matt_fast.support.own_state import own_state
from matt_fast.training.loop import train
from matt_fast.training.state import Progress
from matt_fast.training.trackers import finish_trackers

logger = logging.getLogger(__name__)


class MATT:
    """Model-Aware Tokenizer Transfer with the reference library's calls: prepare_dataset, then train.

    Args:
        config: see `MATTConfig`.
        teacher_tokenizer, student_tokenizer: fast tokenizers, the original one and the new one.

    Attributes:
        dataset_path: folder of the prepared data (a `datasets.Dataset` on disk); None before `prepare_dataset`.
        progress: of the last training, see `matt_fast.training.state.Progress`; None before.

    Raises:
        TypeError: `config` is no MATTConfig, or a tokenizer not a fast one.
    """

    def __init__(
        self,
        config: MATTConfig,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
    ):
        check_type("config", config, MATTConfig)
        for name, tokenizer in (("teacher_tokenizer", teacher_tokenizer), ("student_tokenizer", student_tokenizer)):
            check_fast(tokenizer, name)
            check_constant(tokenizer, name)
        self.config = config
        self.teacher_tokenizer, self.student_tokenizer = teacher_tokenizer, student_tokenizer
        self.dataset_path: str | None = None
        self.progress: Progress | None = None

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
            ValueError: no such column, or one that holds no texts; no text; a `max_length` that special tokens fill.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"dataset: wanted a datasets.Dataset (not a stream or a dict), got {type(dataset).__name__}"
            )
        if text_column_name not in dataset.column_names:
            raise ValueError(
                f"text_column_name: wanted one of the columns {dataset.column_names}, got {text_column_name!r}"
            )
        check_text_column(dataset, text_column_name, "text_column_name")
        tokenizers = (self.teacher_tokenizer, self.student_tokenizer)
        digest = data_key(dataset, text_column_name, tokenizers, max_length)
        folder = Path(dataset_output_dir or self.config.dataset_output_dir) / digest
        state = PartialState(cpu=self.config.accelerator == "cpu")
        with state.main_process_first():  # the others find it made
            if find_damage(folder) or (force_reprocess and state.is_main_process):
                sides = tuple(
                    Side(name, tokenizer, vocabulary_rows(token_bytes(tokenizer)), max_length)
                    for name, tokenizer in zip(("teacher", "student"), tokenizers, strict=True)
                )
                options = {
                    "batch_size": batch_size,
                    "num_proc": min(num_proc or os.cpu_count() or 1, len(dataset)) or None,
                    "fn_kwargs": {"sides": sides, "column": text_column_name},
                    "new_fingerprint": digest,
                }
                prepare(dataset, folder, **options)
        self.dataset_path = str(folder)

    def prepare_frozen_embeddings_mask(self) -> torch.Tensor:
        """[student tokens] bool: True where the teacher has the same token, byte for byte or by its role."""
        mask = torch.zeros(len(self.student_tokenizer), dtype=torch.bool)
        shared = match_tokens(self.student_tokenizer, self.teacher_tokenizer)
        mask[[i for i in shared if i < len(mask)]] = True  # ids may have gaps
        logger.info("%d of %d tokens are shared", int(mask.sum()), len(mask))
        return mask

    @own_state()
    def train(self, teacher_model: PreTrainedModelForAIM, student_model: PreTrainedModelForAIM, **kwargs) -> MATTOutput:
        """Train the student's embeddings on the prepared data; `student_model` has them afterwards, too.

        Args:
            teacher_model, student_model: of the classes of `matt_fast.modeling`, with the same `n_layers`.
            **kwargs: the reference library hands them to Lightning's Trainer; there is none here, so none is accepted.

        Raises:
            RuntimeError: `prepare_dataset` was not called.
            TypeError: a model of another class, or any further argument.
            ImportError: the configuration wants wandb, which is not installed.
            ValueError: models, configuration and data that do not fit together.
            FloatingPointError: the loss became NaN or infinite.
        """
        if self.dataset_path is None:
            raise RuntimeError(
                "prepare_dataset: wanted it to be called before train, e.g. matt.prepare_dataset(data, 512)"
            )
        if kwargs:
            raise TypeError(f"train: arguments for Lightning's Trainer have no meaning here, got {', '.join(kwargs)}")
        config = replace(self.config)  # checked again: someone may have changed it
        self._check_models(teacher_model, student_model)
        set_seed(config.seed)
        accelerator = _accelerator(config)
        data = load_from_disk(self.dataset_path).with_format("numpy")
        options = training_options(config, len(data), accelerator.num_processes)
        for name, side in (("teacher_model", teacher_model), ("student_model", student_model)):
            place(side, name, PRECISIONS[config.precision], accelerator.device)
        student = student_tables(student_model)
        checkpoints = Checkpoints(config, student, accelerator)

        display = ProgressDisplay(Console(quiet=not accelerator.is_main_process), options.steps)

        def on_step(progress: Progress) -> None:
            display.on_step(progress)
            if progress.step == 1:
                accelerator.log({"flops": flops_of_a_chunk(progress, config, len(data), accelerator)}, step=1)
            last = progress.step == options.steps
            if last or progress.step % config.log_every_n_steps == 0:
                lr = options.lr_at(progress.step)
                logger.info("step %d: loss %.6g, lr %.3g, %s", progress.step, progress.loss, lr, progress.parts)
                accelerator.log({"loss": progress.loss, "lr": lr, **losses_logged(progress.parts)}, step=progress.step)
            if last or progress.step % config.save_every_n_steps == 0:
                checkpoints.save(progress)

        passes = batches(data, config, accelerator)
        models = teacher_model.trunk, student_model.trunk
        begin_figures(accelerator.device)
        try:
            with display:
                self.progress, _ = train(
                    *models, student, passes, student_model.n_layers, options, accelerator, on_step
                )
        finally:
            passes.close()
            write_back(student, student_model)
        accelerator.log(figures_at_end(self.progress, accelerator.device), step=self.progress.step)
        finish_trackers(accelerator)
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
        highest = json.loads((Path(self.dataset_path) / HIGHEST_IDS).read_text())
        for side, model in (("teacher", teacher_model), ("student", student_model)):
            rows = len(input_table(model))
            if highest[side] >= rows:
                raise ValueError(
                    f"{side}_model: wanted a row for every id of the prepared data, which go up to {highest[side]}, "
                    f"got an embedding of {rows} rows; resize it and initialise the new rows first "
                    "(resize_token_embeddings and matt_fast.initialize), or load a model made for the tokenizer"
                )
        if not (student_model.tied or student_model.with_ntp):
            logger.warning(
                "student_model's output head is not tied to its input embeddings: rows of new tokens in it are not "
                "trained; set with_ntp=True here and in MATTConfig to train them"
            )
        self._warn_if_not_initialised(teacher_model, student_model)

    def _warn_if_not_initialised(self, teacher_model, student_model) -> None:
        """Frozen rows are never corrected: they must be the teacher's rows of the same tokens."""
        embedding = student_model.get_input_embeddings()
        theirs, mine = input_table(teacher_model), input_table(student_model)
        if not isinstance(embedding, PartlyFrozenEmbeddings) or theirs.shape[1] != mine.shape[1]:
            return
        frozen = embedding.frozen_mask.tolist()
        matches = match_tokens(self.student_tokenizer, self.teacher_tokenizer)
        teacher_of = {i: match.teacher_id for i, match in matches.items() if match.teacher_id < len(theirs)}
        shared = [i for i in teacher_of if i < len(frozen) and frozen[i]]
        expected = theirs[[teacher_of[i] for i in shared]].to(mine)
        different = int((mine[shared] != expected).any(1).sum())
        if different:
            logger.warning(
                "%d of %d frozen rows of student_model are not the teacher's rows of the same tokens, and stay as they "
                "are: initialise it for the new tokenizer first (matt_fast.initialize), or give no mask",
                different,
                len(shared),
            )


def _accelerator(config: MATTConfig) -> Accelerator:
    if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"accelerator: wanted a CUDA device for {config.accelerator!r}, got none; use 'auto' or 'cpu'")
    if config.use_wandb and find_spec("wandb") is None:
        raise ImportError(f"use_wandb: wandb is missing: {packages_line('wandb')}")
    accelerator = Accelerator(
        cpu=config.accelerator == "cpu",
        mixed_precision="no",  # what the weights are in is settled by their own dtype
        log_with="wandb" if config.use_wandb else None,
    )
    processes, there = accelerator.num_processes, torch.cuda.device_count()
    if config.devices not in (-1, "auto", processes):
        raise ValueError(
            f"devices: wanted the {processes} processes that were started, got {config.devices}; start as many with "
            "accelerate launch or torchrun"
        )
    if config.devices == -1 and processes == 1 < there and accelerator.device.type == "cuda":
        logger.warning("devices: one of %d GPUs is used; start with accelerate launch or torchrun for more", there)
    if config.use_wandb:
        os.makedirs(config.wandb_output_dir, exist_ok=True)
        accelerator.init_trackers(config.wandb_project, asdict(config), {"wandb": {"dir": config.wandb_output_dir}})
    return accelerator
