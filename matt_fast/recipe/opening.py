"""How the work on a run begins and ends: signals, processes, the output's lock, and what an error says at its end."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from matt_fast.recipe.job import Job
from matt_fast.recipe.run import Run, reserved
from matt_fast.recipe.work import Listeners, Work, make_accelerator
from matt_fast.support.stopping import stopping
from matt_fast.training.trackers import accelerator_options


@contextmanager
def opened(job: Job, output: str | Path, resume: bool, listeners: Listeners) -> Iterator[Work]:
    """The work on a job, with its run in `output` reserved by the main process.

    An error in the block gets a note that says how to go on from what is there.

    Raises:
        FileExistsError, ValueError, OSError: what `reserved` and `Work` raise.
    """
    with ExitStack() as stack:
        stop = stack.enter_context(stopping())
        run = Run(output)
        accelerator = make_accelerator(job, **accelerator_options(job.track, run.folder))
        if accelerator.is_main_process:
            run = stack.enter_context(reserved(output, resume))
            stop.how_to_go_on = lambda: run.how_to_go_on
        accelerator.wait_for_everyone()
        try:
            yield Work(job, run, accelerator, stop, listeners)
        except Exception as error:
            if accelerator.is_main_process and run.path("run.json").exists() and run.has_something:
                error.add_note(run.how_to_go_on)
            raise
        accelerator.wait_for_everyone()
