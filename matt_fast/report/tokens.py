"""Tables of new tokens, drawn by page.js from compact JSON: that of a run's page, and a page of its own."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from matt_fast.alignment.vocabulary import Token, show_token
from matt_fast.report.charts import as_json
from matt_fast.report.frame import framed

if TYPE_CHECKING:  # it imports torch
    from matt_fast.show.tokens import TokenRow

BYTES = 2_200_000  # of all tables of a page; the whole page stays below 3 MB
FEW = 1000  # records by which the size of all is estimated
FIGURES = ("seen", "moved", "norm", "outlier")
NEAR = ("before", "after")
HEADS = {
    "token": "token",
    "id": "id",
    "start": "start",
    "pieces": "old tokens",
    "seen": "seen",
    "moved": "moved",
    "norm": "norm",
    "before": "nearest at the start",
    "after": "nearest now",
    "outlier": "outlier",
}


def tokens_section(
    records: Sequence[Mapping],
    tokens: Mapping[int, Token],
    old_tokens: Mapping[int, Token] | None,
    room: int = BYTES,
) -> str:
    """HTML of the table of a run's new tokens; those seen most often, where not all fit.

    Args:
        records: of `read_provenance`.
        tokens, old_tokens: id -> token of the new and the original tokenizer; the latter None where that is not here.
        room: bytes that the table may have.
    """
    if not records:
        return "<p>No token is new.</p>"

    def row(record: Mapping) -> dict[str, Any]:
        pieces = None if old_tokens is None else [show_token(old_tokens.get(i)) for i in record["teacher_ids"]]
        return {**record, "token": show_token(tokens.get(record["id"])), "pieces": pieces}

    data, shown = _fitting(sorted(records, key=lambda x: (-x["seen"], x["id"])), row, room)
    unseen = sum(not x["seen"] for x in records)
    note = f"{len(records):,} tokens are new; training never saw {unseen:,} of them."
    if shown < len(records):
        note += f" The {shown:,} seen most often are in this table; token_provenance.jsonl has all."
    if "moved" in data:
        note += " Moved: the length of the change of a token's input row; norm: the length of the row now."
    return f"<p>{escape(note)}</p>\n{_table(data, 'seen')}"


def tokens_page(tokens: "Sequence[TokenRow]", of_all: int, order: str, note: str) -> str:
    """HTML of a page with a row for each token.

    Args:
        tokens: in the order to begin with.
        of_all: how many new tokens there are.
        order: by what they are ordered.
        note: what "moved" is measured from.
    """
    starts = ", ".join(f"{count:,} {start}" for start, count in Counter(x.start for x in tokens).most_common())
    told = (
        f"{len(tokens):,} of {of_all:,} new tokens; how they started: {starts or 'none'}. "
        f"{sum(not x.seen for x in tokens):,} were never seen in training. {sum(x.stands_out for x in tokens):,} stand "
        f"out, with a mark on the left, by their norm or change. {note} Click on a heading to sort."
    )
    data = _columns([vars(x) | {"marked": x.stands_out} for x in tokens])
    return framed("New tokens", f"<main><p>{escape(told)}</p>\n{_table(data, order)}</main>")


def _table(data: Mapping[str, Any], order: str) -> str:
    heads = "".join(_head(name, order) for name in HEADS if name in data)
    return (
        '<div class="tokens"><p class="tools"><label>Search <input type="search" placeholder="part of a token, '
        'or an id" autocomplete="off" spellcheck="false"></label> <output aria-live="polite"></output></p>\n'
        '<div class="wide" role="region" tabindex="0" aria-label="new tokens"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody></tbody></table></div>\n"
        '<p class="pager"><button type="button" data-step="-1">Previous</button> <span></span> '
        '<button type="button" data-step="1">Next</button></p>\n'
        "<noscript><p>The table is drawn by a script, which is switched off here.</p></noscript>\n"
        f'<script type="application/json">{as_json(data)}</script></div>\n'
    )


def _head(name: str, order: str) -> str:
    if name in NEAR:
        return f'<th scope="col" data-key="{name}">{HEADS[name]}</th>'
    sorted_by = f' aria-sort="{"ascending" if name == "id" else "descending"}"' if name == order else ""
    return f'<th scope="col" data-key="{name}"{sorted_by}><button type="button">{HEADS[name]}</button></th>'


def _fitting(records: Sequence[Mapping], row: Callable[[Mapping], Mapping], room: int) -> tuple[dict[str, Any], int]:
    """The columns of the rows of as many records as fit, and how many those are."""

    def first(count: int) -> tuple[dict[str, Any], int]:
        data = _columns([row(x) for x in records[:count]])
        return data, len(as_json(data).encode())

    few = min(FEW, len(records))
    count = min(len(records), int(2 * room * few / first(few)[1]) + 1)  # few share few old tokens: each takes more
    data, size = first(count)
    while size > room and count > 1:
        count = max(1, int(0.98 * count * room / size))
        data, size = first(count)
    return data, count


def _columns(rows: Sequence[Mapping]) -> dict[str, Any]:
    """The columns that all rows have; texts that come again and again by their places in lists of them."""
    starts = _places(x["start"] for x in rows)
    pieces = [x["pieces"] for x in rows if x["pieces"] is not None]
    near = {name: [x[name] for x in rows] for name in NEAR if any(x.get(name) for x in rows)}
    old = _places(
        text
        for texts in (*pieces, *([text for text, _ in found] for column in near.values() for found in column))
        for text in texts
    )
    data: dict[str, Any] = {
        "token": [x["token"] for x in rows],
        "id": [x["id"] for x in rows],
        "start": [starts[x["start"]] for x in rows],
        "starts": list(starts),
        "old": list(old),
        "marked": [place for place, x in enumerate(rows) if x.get("marked")],
    }
    if len(pieces) == len(rows):
        data["pieces"] = [[old[text] for text in texts] for texts in pieces]
    for name in FIGURES:
        if all(isinstance(x.get(name), int | float) for x in rows):
            data[name] = [_short(x[name]) for x in rows]
    for name, column in near.items():
        data[name] = [[[old[text], round(cosine, 2)] for text, cosine in found] for found in column]
    return data


def _short(value: float) -> float | None:
    """A figure in four digits, a count in all; None for what JSON does not have."""
    return value if isinstance(value, int) else float(f"{value:.4g}") if math.isfinite(value) else None


def _places(texts: Iterable[str]) -> dict[str, int]:
    return {text: place for place, text in enumerate(dict.fromkeys(texts))}
