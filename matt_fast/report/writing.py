"""From the folder of a run to its page: read, computed, written."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from matt_fast.alignment.vocabulary import VocabularyPair, token_bytes
from matt_fast.model.tokenizer_files import load_tokenizer
from matt_fast.report.page import Shown, report_page
from matt_fast.report.sample import MOST
from matt_fast.report.words import NAME
from matt_fast.runs.record import PROVENANCE, Record, read_provenance, read_record
from matt_fast.show.pieces import find_segments
from matt_fast.support.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_report(output: Path, vocabulary: VocabularyPair, on_message: Callable[[str], None]) -> None:
    """Write the page of the run that has just ended into its output. What goes wrong is told: the model is there.

    Args:
        output: the folder of the run.
        vocabulary: its two vocabularies.
        on_message: told why there is no page.
    """
    try:
        record = read_record(output, ends=True)
        missing = {"influence": f"as it runs the models: matt-fast report {output.name} adds it"}
        sides = vocabulary.teacher, vocabulary.student
        shown = Shown(
            record,
            records=read_provenance(output),
            tokens=vocabulary.tokens,
            old_tokens=vocabulary.teacher_tokens,
            **segments_of(record.sample, sides, missing),
        )
        write_text(output / NAME, report_page([shown]))
    except Exception as error:  # nothing of a page is worth the result
        on_message(f"no {NAME}: {type(error).__name__}: {error}")


def look_again(record: Record, text: str | None, **options) -> Shown:
    """What a page has beside the files of a run, as far as its two tokenizers are still there.

    Args:
        record: of the run.
        text: sample text, in place of the run's own.
        **options: of `load_tokenizer`.
    """
    missing: dict[str, str] = {}
    old = _tokenizer(record.options["model"], "model", missing, **options)
    new = _tokenizer(
        record.folder if record.has_model else record.options["tokenizer"], "tokenizer", missing, **options
    )
    found: dict = {"missing": missing}
    if old is not None and new is not None:
        found |= segments_of(text or record.sample, (old, new), missing)
    if not record.has_model or not (record.folder / PROVENANCE).is_file():
        missing["tokens"] = "as the model is not written yet"
    elif new is not None:
        found |= {"records": read_provenance(record.folder), "tokens": token_bytes(new)}
        found["old_tokens"] = None if old is None else token_bytes(old)
    return Shown(record, **found)


def segments_of(text: str | None, sides: "tuple[PreTrainedTokenizerBase, ...]", missing: dict[str, str]) -> dict:
    """The fields `segments` and `missing` of a run that is shown."""
    if not text:
        missing["segments"] = "as the run kept no sample text"
        return {"missing": missing}
    try:
        return {"segments": find_segments(text[:MOST], *sides), "missing": missing}
    except (TypeError, ValueError) as error:
        return {"missing": missing | {"segments": f"as {error}"}}


def _tokenizer(place, argument: str, missing: dict[str, str], **options) -> "PreTrainedTokenizerBase | None":
    try:
        return load_tokenizer(place, argument, **options)
    except (OSError, TypeError, ValueError) as error:
        for part in ("segments", "tokens") if argument == "tokenizer" else ("segments",):
            missing.setdefault(part, f"as {' '.join(str(error).split())}")
        return None
