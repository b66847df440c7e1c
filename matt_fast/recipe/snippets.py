"""The stage in which the teacher writes texts around new tokens that are rare in the data: `snippets/` of the run."""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path

from matt_fast.alignment.vocabulary import VocabularyPair, special_affixes
from matt_fast.data.chunks import Side
from matt_fast.data.coverage import how_often
from matt_fast.data.prepared import prepare_once
from matt_fast.data.snippets import BETWEEN, as_documents, make_snippets
from matt_fast.recipe.result import SnippetCounts
from matt_fast.recipe.work import Work
from matt_fast.runs.folder import DRAWN, Run
from matt_fast.support.journal import Journal

PLACE, TEXTS, COUNTS = "snippets", "snippets.jsonl", "counts.json"


def snippet_chunks(
    work: Work, pair: VocabularyPair, new: Collection[int], folders: tuple[Path, ...], sides: tuple[Side, Side]
) -> tuple[Path, ...]:
    """The folder of their chunks; none where no token needs them. The main process of all lets the teacher write.

    Args:
        work: of the transfer.
        pair: the vocabularies of the model to learn from and of the student.
        new: student ids of the tokens that are wanted.
        folders: of the text's chunks; none without a text.
        sides: the teacher's and the student's.

    Raises:
        ValueError: there is no text, and the teacher wrote nothing with a new token either.
    """

    def make(part: Path) -> None:
        _write(part, work, pair, how_often(folders, new), chunks)

    def chunks(place: Path) -> Path:
        given = {"split": "train", "text_field": "text", "on_message": work.say}
        return prepare_once(work.run.path("data"), place / TEXTS, *sides, **given)

    if work.has(PLACE):
        place = work.run.path(PLACE)
    else:
        with work.stage("snippets"):
            place = work.once(PLACE, make)
    if work.is_main:
        work.run.path(DRAWN).unlink(missing_ok=True)
    counts = snippet_counts(work.run)
    work.say(f"snippets: {counts.message()}")
    if counts.snippets == 0:
        if not folders:
            raise ValueError(
                f"snippets: wanted text with new tokens from the teacher, got none for {counts.seldom:,} tokens; give "
                "data"
            )
        return ()
    with work.processes.first(here=False):
        return (chunks(place),)


def snippet_counts(run: Run) -> SnippetCounts | None:
    """What a run's teacher wrote; None where it was not asked to."""
    found = run.read(f"{PLACE}/{COUNTS}")
    return SnippetCounts(**found) if found else None


def _write(
    folder: Path, work: Work, pair: VocabularyPair, in_text: dict[int, int], chunks: Callable[[Path], Path]
) -> None:
    """Write the documents and what they come to.

    Args:
        folder: to write into.
        work, pair: as in `snippet_chunks`.
        in_text: new token -> how often it comes in the text.
        chunks: gives the chunks of what was written into a folder.
    """
    job = work.job
    wanted = {i: job.snippets - count for i, count in in_text.items() if count < job.snippets}
    given = {"texts": work.texts() or (), "once": Journal(work.run.path(DRAWN))}
    given |= {"on_progress": lambda done, total: work.tell("snippets", done, total)}
    model = work.whole() if work.other is None else work.other.load(work.dtype).to(work.device)
    made = make_snippets(model, pair, wanted, job.seed, **given)
    documents = list(as_documents(made.kept, job.max_length - sum(map(len, special_affixes(pair.teacher))), job.seed))
    texts = [BETWEEN.join(x.text for x in document) for document in documents]
    names = pair.student.convert_ids_to_tokens
    with (folder / TEXTS).open("w", encoding="utf-8") as file:
        for text, document in zip(texts, documents, strict=True):
            row = {"text": text, "tokens": names([x.token for x in document])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    there = how_often((chunks(folder),) if texts else (), wanted)
    have = [in_text[i] + there[i] for i in wanted]
    enough, absent = sum(count >= job.snippets for count in have), have.count(0)
    counts = SnippetCounts(
        job.snippets,
        len(wanted),
        enough,
        len(wanted) - enough - absent,
        absent,
        len(made.kept),
        made.dropped,
        made.generated,
    )
    (folder / COUNTS).write_text(json.dumps(asdict(counts)) + "\n", encoding="utf-8")
