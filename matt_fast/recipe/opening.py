"""How the work on a run begins and ends: signals, processes, the output's lock, and what an error says at its end."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from matt_fast.recipe.arguments import check_arguments, check_output_apart
from matt_fast.recipe.job import Job
from matt_fast.recipe.processes import Processes, together
from matt_fast.recipe.run_files import check_run_files
from matt_fast.recipe.same import same_everywhere
from matt_fast.recipe.work import Listeners, Work, make_accelerator
from matt_fast.runs.folder import Resume, Run, reserved
from matt_fast.support.files import LATE
from matt_fast.support.locks import this_process
from matt_fast.support.stopping import stopping
from matt_fast.training.trackers import accelerator_options, log_in

OF_THE_PROCESS = ("device", "precision", "track")  # what processes need before they can tell each other of errors


@contextmanager
def opened(arguments: Mapping[str, Any], output: str | Path, resume: Resume, listeners: Listeners) -> Iterator[Work]:
    """The work on a job, with its run in `output` reserved by the main process.

    An error in the block gets a note that says how to go on from what is there; other processes are told of it.

    Args:
        arguments: of a `Job`.
        output, resume: see `transfer`.
        listeners: whom to tell.

    Raises:
        FileExistsError, ValueError, TypeError, OSError: what `Job`, `reserved` and `Work` raise.
        OtherProcessError: another process ended with an error.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stopping())
        run = Run(output)
        early = {name: arguments[name] for name in OF_THE_PROCESS}
        check_arguments(early | {"resume": resume})
        options = accelerator_options(early.pop("track"), run.folder)
        accelerator = make_accelerator(**early, **options)
        processes = stack.enter_context(together(accelerator))
        if accelerator.is_main_process:
            log_in(arguments["track"])
        job = Job(**arguments)
        check_output_apart(output, arguments)
        processes.check_same(same_everywhere(job, resume) if processes.count > 1 else {})
        if accelerator.is_main_process:
            run = stack.enter_context(reserved(output, resume))
            stop.how_to_go_on = lambda: run.how_to_go_on
            check_run_files(run)
        _check_shared(run, processes)
        try:
            yield Work(job, run, accelerator, processes, stop, listeners)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                error.add_note(_less_memory(job))
            going_on = run.begun and run.has_something and run.status != "finished"
            if accelerator.is_main_process and going_on:
                error.add_note(run.how_to_go_on)
            raise
        processes.wait()


def _less_memory(job: Job) -> str:
    """What would take less of the device's memory than what the job does."""
    kept = [] if job.training.checkpointing else ["checkpointing"]
    if job.batch_size > 1:
        parts = next(n for n in range(2, job.batch_size + 1) if job.batch_size % n == 0)
        kept.append(f"batch_size {job.batch_size // parts} with accumulation {job.training.accumulation * parts}")
    found = [f"{' or '.join(kept)}, with which a run that has begun can go on too"] if kept else []
    found += ["a shorter max_length"] + ([] if job.training.quantization else ["quantization"])
    return f"Less memory: {', '.join(found)}. matt-fast plan says what a step takes."


def _check_shared(run: Run, processes: Processes) -> None:
    """Raise a ValueError in a process that does not see what the main process wrote into the run's folder."""
    owner = processes.of_main(this_process())
    end = time.monotonic() + LATE
    while processes.index and run.owner != owner:
        if time.monotonic() > end:
            raise ValueError(
                f"output: wanted a folder that all machines share, but {processes.name(processes.index)} does not see "
                f"what {processes.name(0)} writes into {str(run.output)!r}"
            )
        time.sleep(0.2)
    processes.wait()
