"""The page: the parts of one run or of several, in their order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from matt_fast.alignment.vocabulary import Token
from matt_fast.report.comparison import comparison_section, names_of
from matt_fast.report.figures import bits_table, completions, compression_table, key_figures
from matt_fast.report.frame import framed
from matt_fast.report.sample import influence_section, segments_section
from matt_fast.report.sentences import messages, options_table, status_line, what_was_done
from matt_fast.report.tokens import BYTES, tokens_section
from matt_fast.report.training import training_charts
from matt_fast.report.words import last_part, named
from matt_fast.runs.record import Record
from matt_fast.show.pieces import Segments

if TYPE_CHECKING:  # it imports torch
    from matt_fast.show.influence import Influence


TITLES = {
    "done": "What was done",
    "bits": "Bits per byte",
    "compression": "Compression",
    "training": "Training",
    "sample": "A sample text",
    "completions": "Completions",
    "tokens": "New tokens",
    "warnings": "Warnings and messages",
    "configuration": "Configuration",
}


@dataclass(frozen=True)
class Shown:
    """A run, and what was computed for its page.

    Attributes:
        record: what it left on disk.
        records: the lines of its token_provenance.jsonl that tell of new tokens; None before the model is written.
        tokens, old_tokens: id -> token of the new and the original tokenizer; None where one is not here.
        segments: of the sample text; None where they could not be made.
        influence: of its beginning; None likewise.
        influence_note: a sentence on it.
        missing: part -> why it is not shown, plain text.
    """

    record: Record
    records: Sequence[Mapping] | None = None
    tokens: Mapping[int, Token] | None = None
    old_tokens: Mapping[int, Token] | None = None
    segments: Segments | None = None
    influence: "Influence | None" = None
    influence_note: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)


def report_page(runs: Sequence[Shown]) -> str:
    """HTML of the page, which needs nothing beside it.

    Args:
        runs: one or more; several are compared first.

    Raises:
        ValueError: a run's metrics are damaged.
    """
    records = [x.record for x in runs]
    names = names_of(records)
    body = []
    if len(runs) > 1:
        title = f"{len(runs)} transfers compared"
        links = "".join(f'<li><a href="#run-{i}">{escape(x)}</a></li>' for i, x in enumerate(names, 1))
        body.append(f'<section id="comparison"><h2>Comparison</h2>{comparison_section(records, names)}</section>')
        links = f'<li><a href="#comparison">Comparison</a></li>{links}'
    else:
        what = "trained on" if records[0].trained_on else "with a new tokenizer"
        title = f"{last_part(records[0].options['model'])} {what}"
        links = "".join(f'<li><a href="#{key}-1">{name}</a></li>' for key, name in _titles(records[0]).items())
    for number, (shown, name) in enumerate(zip(runs, names, strict=True), 1):
        body.append(_run(shown, name, number, len(runs)))
    made = f"Made by matt-fast {escape(records[0].version)}."
    html = (
        f'<nav aria-label="parts of the page"><ul>{links}</ul></nav>\n<main>\n{"".join(body)}</main>\n'
        f"<footer><p>{made} This page loads nothing from anywhere.</p></footer>"
    )
    return framed(title, html)


def _run(shown: Shown, name: str, number: int, of: int) -> str:
    record = shown.record
    parts = [f'<section class="run" id="run-{number}">']
    if of > 1:
        parts.append(f"<h2>{escape(name)}</h2>")
    parts.append(status_line(record) + key_figures(record))
    level, sections = 3 if of > 1 else 2, _sections(shown, BYTES // of)
    for key, title in _titles(record).items():
        parts.append(f'<section id="{key}-{number}"><h{level}>{title}</h{level}>\n{sections[key]}</section>\n')
    return "".join(parts) + "</section>\n"


def _titles(record: Record) -> dict[str, str]:
    """key -> title of the parts that the page of a run has, in their order."""
    return TITLES if record.completions else {key: title for key, title in TITLES.items() if key != "completions"}


def _sections(shown: Shown, room: int) -> dict[str, str]:
    """key -> HTML of the parts of a run; `room` is the bytes that its table of tokens may have."""
    record = shown.record
    sentences = "".join(f"<p>{x}</p>" for x in what_was_done(record))
    table = f"<details><summary>Every option</summary>{options_table(record)}</details>"
    return {
        "done": f"{sentences}{table}",
        "bits": bits_table(record),
        "compression": compression_table(record),
        "training": training_charts(record),
        "sample": _sample(shown),
        "completions": completions(record),
        "tokens": _tokens(shown, room),
        "warnings": messages(record),
        "configuration": _configuration(record),
    }


def _sample(shown: Shown) -> str:
    options = shown.record.options
    parts = []
    if shown.segments is None:
        parts.append(_why_not("Segments", shown.missing.get("segments")))
    else:
        parts.append(segments_section(shown.segments, *(last_part(options[x]) for x in ("model", "tokenizer"))))
    if shown.influence is None:
        parts.append(_why_not("Attention influence", shown.missing.get("influence")))
    else:
        parts.append(influence_section(shown.influence, shown.influence_note))
    return "".join(parts)


def _tokens(shown: Shown, room: int) -> str:
    if shown.records is None or shown.tokens is None:
        return _why_not("The table of new tokens", shown.missing.get("tokens"))
    return tokens_section(shown.records, shown.tokens, shown.old_tokens, room)


def _why_not(what: str, why: str | None) -> str:
    return f'<p class="note">{what}: not shown{f", {escape(why)}" if why else ""}.</p>'


def _configuration(record: Record) -> str:
    return (
        "<p>Save it as <code>run.yaml</code>; <code>matt-fast transfer --config run.yaml --output FOLDER</code> makes "
        f"the run again. It is in {named(record.folder.name + '/run/run.yaml')} too.</p>\n"
        '<div class="configuration"><button type="button" class="copy">Copy</button>'
        f'<pre tabindex="0"><code>{escape(record.configuration)}</code></pre></div>'
    )
