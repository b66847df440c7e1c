"""The stage in which the teacher writes texts of its own, to be read among the data: `rehearsal/` of the run."""

import json
from pathlib import Path

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side
from matt_fast.data.prepared import prepare_once
from matt_fast.data.rehearsal import own_texts
from matt_fast.recipe.result import Rehearsal
from matt_fast.recipe.work import Work
from matt_fast.runs.folder import DRAWN, Run
from matt_fast.support.journal import Journal

PLACE, TEXTS = "rehearsal", "texts.jsonl"


def own_chunks(work: Work, pair: VocabularyPair, sides: tuple[Side, Side]) -> Path:
    """The folder of their chunks. The main process lets the teacher write.

    Args:
        work: of the transfer.
        pair: the vocabularies of the model to learn from and of the student.
        sides: the teacher's and the student's.

    Raises:
        ValueError: the teacher wrote nothing, or cannot write, see `own_texts`.
    """

    def make(part: Path) -> None:
        model = work.whole() if work.other is None else work.other.load(work.dtype).to(work.device)
        told = lambda done, total: work.tell("texts of its own", done, total)  # noqa: E731
        once = Journal(work.run.path(DRAWN))
        texts = own_texts(model, pair, work.job.rehearse, work.job.seed, once=once, on_progress=told)
        if not texts:
            raise ValueError(
                f"rehearse: wanted texts from the teacher, got none of {work.job.rehearse:,} that it began"
            )
        rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (part / TEXTS).write_text("".join(rows), encoding="utf-8")

    if work.has(PLACE):
        place = work.run.path(PLACE)
    else:
        with work.stage("rehearsal"):
            place = work.once(PLACE, make)
    if work.is_main:
        work.run.path(DRAWN).unlink(missing_ok=True)
    with work.processes.first(here=False):
        given = {"split": "train", "text_field": "text", "on_message": work.say}
        own = prepare_once(work.run.path("data"), place / TEXTS, *sides, **given)
    work.say(f"rehearsal: {rehearsal_of(work.run).message()}")
    return own


def rehearsal_of(run: Run) -> Rehearsal | None:
    """What a run's teacher wrote of its own; None where it was not asked to."""
    path = run.path(PLACE) / TEXTS
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as lines:  # `splitlines` would part them within texts, too
        texts = [json.loads(line)["text"] for line in lines]
    return Rehearsal(len(texts), sum(map(len, texts)))
