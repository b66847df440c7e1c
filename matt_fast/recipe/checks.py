"""What is looked at before a run begins or goes on."""

import json
from importlib.metadata import version

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.recipe.job import changes
from matt_fast.recipe.work import Work


def preflight(work: Work, vocabulary: VocabularyPair) -> None:
    """Compare with the run that goes on, or begin a new one; in the main process.

    Raises:
        ValueError: an argument, a file or the version is not what the run began with.
    """
    job, run = work.job, work.run
    settings = job.settings() | {"processes": work.accelerator.num_processes}
    fingerprints: dict = {}
    known = run.read("run.json")
    if known:
        if known["version"] != version("matt-fast"):
            raise ValueError(f"resume: the run began with matt-fast {known['version']}, this is {version('matt-fast')}")
        found = changes(known["settings"], json.loads(json.dumps(settings)), run.status == "diverged")
        if found:
            raise ValueError(f"resume: wanted what the run in {str(run.output)!r} began with, got " + "; ".join(found))
    run.begin(settings, fingerprints, json.dumps(job.configuration(run.output), indent=1))
