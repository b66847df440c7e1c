"""The whole job: from a model and a tokenizer to a folder that loads and generates (paper §3.5)."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from matt_fast.initializers import Method
from matt_fast.recipe import stages
from matt_fast.recipe.finish import finish, finished_result
from matt_fast.recipe.job import Job
from matt_fast.recipe.opening import opened
from matt_fast.recipe.result import TransferResult
from matt_fast.recipe.training_stages import heal, train_rows
from matt_fast.recipe.work import Listeners
from matt_fast.runs.folder import Resume
from matt_fast.support.checks import checked
from matt_fast.support.own_state import own_state
from matt_fast.support.printable import printable
from matt_fast.training.options import HealingOptions, TrainingOptions
from matt_fast.training.state import Progress


def job_of(given: Mapping[str, Any]) -> Job:
    """The job of some arguments of `transfer`, the others as they are by default.

    Raises:
        TypeError: an argument that `transfer` does not have.
        ValueError, OSError: what `Job` raises.
    """
    arguments = {name: x.default for name, x in inspect.signature(transfer).parameters.items()}
    if unknown := sorted(given.keys() - arguments.keys()):
        raise TypeError(f"{', '.join(unknown)}: wanted arguments of transfer, got others")
    arguments |= given
    arguments["training"] = arguments["training"] or TrainingOptions()
    return Job(**{x.name: arguments[x.name] for x in fields(Job)})


def to_stderr(message: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(printable(message), file=sys.stderr, flush=True)


@checked
@own_state()
def transfer(
    model: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    data: str | Path | None,
    output: str | Path,
    *,
    resume: Resume = False,
    teacher: str | Path | None = None,
    init: str | Path | Method = "mean",
    init_head: str = "same",
    donor: str | Path | None = None,
    omp_k: int = 64,
    parallel: str | Path | None = None,
    map_tokens: Sequence[str] = (),
    freeze_shared: bool = True,
    untie: bool = False,
    n_layers: int | None = None,
    max_length: int = 512,
    batch_size: int = 4,
    training: TrainingOptions | None = None,
    healing: HealingOptions | None = None,
    epochs: float | None = None,
    precision: str = "auto",
    split: str = "train",
    text_field: str = "text",
    per_token: int | None = None,
    snippets: int | None = None,
    rehearse: int = 0,
    data_cache: str | Path | None = None,
    prepared: str | Path | None = None,
    data_workers: int | None = None,
    eval_data: str | Path | Mapping[str, str | Path] | None = None,
    eval_pieces: int = 40,
    completions: int = 3,
    checkpoint_every: str | int = "auto",
    validate_every: str | int | None = None,
    patience: int | None = None,
    track: str | None = None,
    language: Sequence[str] = (),
    seed: int = 0,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
    on_message: Callable[[str], None] = to_stderr,
) -> TransferResult:
    """Give a pretrained language model a new tokenizer and train the embeddings of its new tokens.

    Long because it documents every argument. What is made lies in `output`/run until the end (see `runs/folder.py`):
    killed at any moment, the same call with `resume=True` goes on and gives the same bits on the same machine.

    Args:
        model: folder or hub name of the teacher; its tokenizer is loaded from the same place.
        tokenizer: folder or hub name of the new tokenizer, or a fast tokenizer.
        data: text to train on, see `read_documents`; may be None with `snippets` or `prepared`.
        output: folder to write; it must be new or empty. Of work that failed before a stage was done nothing is left.
        resume: go on with the run in `output`. The other arguments must be those that it began with, but for trackers,
            intervals, and steps: more, or as many as are done, which ends training there. "auto": go on where there is
            a run, begin where there is none.
        teacher: another model to learn from, with a tokenizer of its own: a larger one, say. The objectives are then
            alm, boundary-kl, segment-kl and ntp, which compare what both models predict. `model` itself if None.
        init: how new rows start: a method's name, a function, or ready embeddings; see `initial_rows`.
        init_head: how new output rows start, "same", "boundary" or, untied, by another method; see `initial_rows`.
        donor: model with the new vocabulary, for "omp" and "linear-map".
        omp_k: shared tokens that a new one is a combination of, at most, for "omp" and "omp-self".
        parallel: file of texts and their translations, see `read_pairs`; for init "wechsel" and "transtokenizers".
        map_tokens: "NEW=OLD" for new special tokens that start as the mean of old ones, see `alignment.mapping`.
        freeze_shared: keep the rows of tokens that the teacher has, byte for byte, as they are.
        untie: write a model with an output head of its own, where `model` has one table for both: input and output
            rows of new tokens then start and learn apart. It costs the size of the table, in memory and on disk.
        n_layers: layers to run; the loss is at the last one's attention. A third of the depth if None.
        max_length: tokens of a training chunk, on either side. Longer documents are cut, not truncated.
        batch_size: rows per batch and process; a row is one chunk, or `max_length` tokens of them with packing.
        training: steps, learning rate, loss; see `TrainingOptions`.
        healing: train layers together with the rows, behind the training of the rows; see `HealingOptions`.
        epochs: passes over the data, in place of the steps of `training`; the data is prepared before training.
        precision: of the frozen weights: "no" (float32), "bf16", or "auto" (what accelerate is configured with, else
            bf16 on a device that multiplies in it: most GPUs, CPUs with AVX512-BF16; a run goes on as it began).
            Trained rows and layers and their optimiser are always float32.
        split, text_field: of the data.
        per_token: read chunks first in which every new token comes so often, or as often as the text has it; the data
            is prepared before training.
        snippets: let the teacher write short texts around the new tokens that come fewer times in the data, so that
            each comes so often, see `make_snippets`; they are mixed into the data, which is prepared before training.
        rehearse: texts that the teacher writes of its own, see `own_texts`: conversations, if it is a chat model. One
            chunk in five is theirs. 0: none.
        data_cache: folder in which chunks are prepared before training, once for this data, tokenizers and length, and
            found again; they are made during training if None.
        prepared: folder, or URL that fsspec knows, of chunks that `matt-fast prepare` made for these tokenizers and
            this length; training reads them, and `data`, if given, serves for initialisers alone.
        data_workers: processes that tokenise and collate ahead of the training, see `made_ahead`; the result does not
            depend on it. 0: the training's own. None: 1 beside a CPU that trains, else what cores are free, at most 8.
        eval_data: held-out text; if given, bits per byte are measured before, after initialisation, after training.
        eval_pieces: pieces of 2,048 bytes of it to score, at most.
        completions: places in held-out documents behind which the original and the result write on, of causal models.
        checkpoint_every: a number of steps, or a time such as "10m"; "auto" is ten minutes, or longer where checkpoints
            would take more than 1% of the time. The last two are kept.
        validate_every: measure bits per byte of `eval_data` so often during training, and keep the best weights, be it
            those before the first step: they become the result. The whole model is loaded for it. A time does not give
            the same bits in another run.
        patience: stop behind so many validations without a better one.
        track: "tensorboard", "wandb" or "trackio", or several joined by ",". `run/metrics.jsonl` is always written.
        language: codes of the languages that the new model is for, such as "uk"; they go into its card.
        seed: of initialisation and order of the data.
        device: "cpu", "cuda", "cuda:1" …; what accelerate finds if None.
        trust_remote_code: let the model's or tokenizer's repository run code of its own.
        allow_pickle: accept weights that are not safetensors; loading a pickle can run code.
        on_step: called with the progress after each training step.
        on_stage: called with the name of each stage of the work as it begins.
        on_progress: called with what ("rows", "pieces", "bytes"), how many are done, and of how many if that is known.
        on_message: called with what a person should know.

    Raises:
        FileExistsError: `output` is not empty, holds a run and `resume` is False, or another process works there.
        TypeError, ValueError: an argument does not fit; the message names it.
        FloatingPointError: the loss became NaN or infinite, or went up far above its start; the last good checkpoint
            is kept.
        OtherProcessError: (a RuntimeError) another process of several ended with an error, which it tells.
        KeyboardInterrupt, SystemExit: Ctrl-C; SIGTERM, SIGHUP or SIGUSR1. In training behind a checkpoint.
    """
    given = locals()
    outside = ("output", "resume", "on_step", "on_stage", "on_progress", "on_message")
    arguments = {name: value for name, value in given.items() if name not in outside}
    arguments |= {"training": training or TrainingOptions(), "map_tokens": list(map_tokens), "language": list(language)}
    with opened(arguments, output, resume, Listeners(on_step, on_stage, on_progress, on_message)) as work:
        if work.processes.of_main(work.run.status) == "finished":
            return finished_result(work)
        vocabulary = stages.read_vocabulary(work)
        stages.check(work, vocabulary)
        start = stages.initialise(work, vocabulary)
        stages.measure_start(work, vocabulary, start)
        chunks, options = stages.prepare(work, vocabulary)
        train_rows(work, vocabulary, start, chunks, options)
        heal(work, vocabulary, start, chunks)
        stages.write_model(work, vocabulary, start)
        stages.measure_result(work, vocabulary)
        return finish(work, vocabulary, start)
