"""Everything that can be told of a transfer without training: the same checks that it makes, and more, all of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from matt_fast.recipe.checks import CHECKS, Check
from matt_fast.recipe.doctor import data as of_data
from matt_fast.recipe.doctor import machine as of_machine
from matt_fast.recipe.doctor import model as of_model
from matt_fast.recipe.doctor import tokenizers as of_tokenizers
from matt_fast.recipe.doctor.finding import FAIL, LOOK, OK, Finding, Said
from matt_fast.recipe.subject import NotLookedAt, Subject
from matt_fast.recipe.transfer import job_of
from matt_fast.runs.folder import Run
from matt_fast.support.checks import checked
from matt_fast.support.own_state import own_state

__all__ = ["FAIL", "LOOK", "OK", "Finding", "doctor"]

AREAS = ("model", "tokenizers", "data", "run")
OWN = (
    ("model", "class", of_model.kind),
    ("model", "layer", of_model.target_layer),
    ("model", "head", of_model.head),
    ("model", "rows", of_model.padding),
    ("tokenizers", "vocabularies", of_tokenizers.loaded),
    ("tokenizers", "shared", of_tokenizers.shared),
    ("tokenizers", "special tokens", of_tokenizers.special),
    ("tokenizers", "chat template", of_tokenizers.chat),
    ("data", "text", of_data.readable),
    ("tokenizers", "round trip", of_tokenizers.round_trip),
    ("tokenizers", "offsets", of_tokenizers.offsets),
    ("tokenizers", "use", of_tokenizers.never_made),
    ("data", "segments", of_data.segments),
    ("data", "chunks", of_data.rows),
    ("data", "snippets", of_data.snippets),
    ("data", "rehearsal", of_data.rehearsal),
    ("data", "held-out text", of_data.held_out),
    ("run", "packages", of_machine.packages),
    ("run", "start of rows", of_machine.start_of_rows),
    ("run", "memory", of_machine.memory),
    ("run", "work", of_machine.work),
    ("model", "values", of_model.values),
)
OF_THE_OUTPUT = ("output", "disk")
OF_THE_TEXT = ("text", "round trip", "offsets", "segments", "chunks")

Look = Callable[[Subject], Iterable[Said]]


@checked
@own_state()
def doctor(
    model: str | Path,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    data: str | Path | None,
    output: str | Path | None = None,
    *,
    on_check: Callable[[str], None] = lambda name: None,
    on_progress: Callable[[str, int, int | None], None] = lambda what, done, total: None,
    **options,
) -> list[Finding]:
    """Look at all that a transfer with these arguments needs, and train nothing.

    Where `transfer` ends with the first fault, this finds all. Of much data a sample is read, and of many weights as
    many as some seconds allow; findings say which.

    Args:
        model, tokenizer, data: as in `transfer`.
        output: the folder that would be written; the disk is not looked at if None.
        on_check: called with the name of each check as it begins.
        on_progress: called with what ("bytes", "tensors") is read, how many are, and of how many.
        **options: other arguments of `transfer`.

    Returns:
        What was found, by area: the model, the tokenizers, the data, the run.

    Raises:
        TypeError, ValueError, OSError: an argument that no transfer takes, whatever the model.
    """
    job = job_of({"model": model, "tokenizer": tokenizer, "data": data, **options})
    if output is not None:
        Run(output).check_free(bool(options.get("resume")))
    subject = Subject(job, output, on_progress)
    findings: list[Finding] = []
    missing: set[str] = set()
    leave_out = (OF_THE_OUTPUT if output is None else ()) + (OF_THE_TEXT if data is None else ())
    for area, name, look in _checks(leave_out):
        on_check(f"{area}: {name}")
        findings += _examined(area, name, look, subject, missing)
    if missing:
        line = f"not looked at, as something above is not there: {', '.join(sorted(missing))}"
        findings.append(Finding("run", "left out", LOOK, line, "mend that first"))
    unique: dict[str, Finding] = {}
    for x in findings:  # two checks may end with the same error
        unique.setdefault(x.found, x)
    return sorted(unique.values(), key=lambda x: AREAS.index(x.area))


def _checks(leave_out: tuple[str, ...]) -> Iterator[tuple[str, str, Look]]:
    own = list(OWN)
    yield own.pop(0)  # all others need the model
    others: list[tuple[str, str, Look]] = [(x.area, x.name, partial(_shared, x)) for x in CHECKS]
    yield from (x for x in others + own if x[1] not in leave_out)


def _shared(check: Check, subject: Subject) -> Iterator[Said]:
    lines = list(check.look(subject))
    yield from (Said(LOOK, line) for line in lines)
    if not lines:
        yield Said(OK, check.ok if isinstance(check.ok, str) else check.ok(subject))


def _examined(area: str, name: str, look: Look, subject: Subject, missing: set[str]) -> Iterator[Finding]:
    """What a check finds; its error is one more finding, and so are warnings."""
    said: list[Said] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            for found in look(subject):
                said.append(found)
        except NotLookedAt:
            missing.add(name)
        except Exception as error:  # of whatever kind a transfer would end with
            line = " ".join(str(error).split())
            kind = (
                "" if isinstance(error, ValueError | TypeError | OSError | ImportError) else f"{type(error).__name__}: "
            )
            said.append(Said(FAIL, kind + line))
    own = [str(x.message) for x in warned if issubclass(x.category, UserWarning)]
    said += [Said(LOOK, " ".join(line.split())) for line in dict.fromkeys(own)]
    return (Finding(area, name, *x) for x in said)
