"""The stage in which the teacher writes texts of its own, to be read among the data: `rehearsal/` of the run."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from matt_fast.alignment.vocabulary import VocabularyPair
from matt_fast.data.chunks import Side
from matt_fast.data.prepared import open_chunks, prepare_once
from matt_fast.data.rehearsal import own_texts
from matt_fast.recipe.result import Rehearsal
from matt_fast.recipe.run import DRAWN, Run
from matt_fast.recipe.work import Work
from matt_fast.support.journal import Journal

PLACE, TEXTS = "rehearsal", "texts.jsonl"
SHARE = 0.2  # of the chunks that are read


def rehearsal_chunks(
    work: Work, pair: VocabularyPair, folders: tuple[Path | str, ...], sides: tuple[Side, Side]
) -> tuple[Path, ...]:
    """The folder of their chunks, so often that a fifth of a pass is theirs. The main process lets the teacher write.

    Args:
        work: of the transfer.
        pair: the vocabularies of the model to learn from and of the student.
        folders: of the other chunks.
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
    count, others = len(open_chunks([own])), len(open_chunks(folders))
    times = max(1, round(SHARE / (1 - SHARE) * others / count))
    if work.is_main:
        work.run.update("state.json", rehearsed=times * count / (times * count + others))
    work.say(f"rehearsal: {rehearsal_of(work.run).message()}")
    return (own,) * times


def with_rehearsal(leading: NDArray[np.int64], folders: tuple[Path | str, ...], seed: int) -> NDArray[np.int64]:
    """Chunks that are read first, in random order with a fifth of the teacher's own among them.

    Args:
        leading: numbers of chunks.
        folders: of all chunks; the last is that of `rehearsal_chunks`.
        seed: of the order.
    """
    generator, end = np.random.default_rng(seed), len(open_chunks(folders))
    own = np.arange(end - len(open_chunks(folders[-1:])), end)
    is_own = np.isin(leading, own)
    others, chosen = leading[~is_own], leading[is_own]
    passes = [chosen, generator.permutation(np.setdiff1d(own, chosen))]
    passes += [generator.permutation(own) for _ in range(folders.count(folders[-1]) - 1)]
    count = max(len(chosen), round(SHARE / (1 - SHARE) * len(others)))
    return generator.permutation(np.concatenate([others, np.concatenate(passes)[:count]]))


def rehearsal_of(run: Run) -> Rehearsal | None:
    """What a run's teacher wrote of its own; None where it was not asked to."""
    path = run.path(PLACE) / TEXTS
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as lines:  # `splitlines` would part them within texts, too
        texts = [json.loads(line)["text"] for line in lines]
    return Rehearsal(len(texts), sum(map(len, texts)), run.read("state.json").get("rehearsed", SHARE))
