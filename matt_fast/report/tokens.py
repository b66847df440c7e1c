"""The new tokens of a run as compact JSON, which the page's table is drawn from."""

from collections.abc import Mapping, Sequence
from html import escape

from matt_fast.alignment.vocabulary import Token, show_token
from matt_fast.report.charts import as_json

BYTES = 2_200_000  # of all tables of a page; the whole page stays below 3 MB
FEW = 1000  # records by which the size of all is estimated
FIGURES = ("seen", "moved", "norm")
HEADS = {
    "token": "token",
    "id": "id",
    "start": "start",
    "pieces": "old tokens",
    "seen": "seen",
    "moved": "moved",
    "norm": "norm",
}


def tokens_section(
    records: Sequence[Mapping],
    tokens: Mapping[int, Token],
    old_tokens: Mapping[int, Token] | None,
    room: int = BYTES,
) -> str:
    """HTML of the table of new tokens; those seen most often, where not all fit.

    Args:
        records: of `read_provenance`.
        tokens, old_tokens: id -> token of the new and the original tokenizer; the latter None where that is not here.
        room: bytes that the table may have.
    """
    if not records:
        return "<p>No token is new.</p>"
    data, shown = _fitting(sorted(records, key=lambda x: (-x["seen"], x["id"])), tokens, old_tokens, room)
    heads = "".join(_head(name) for name in HEADS if name in data)
    unseen = sum(not x["seen"] for x in records)
    note = f"{len(records):,} tokens are new; training never saw {unseen:,} of them."
    if shown < len(records):
        note += f" The {shown:,} seen most often are in this table; token_provenance.jsonl has all."
    if "moved" in data:
        note += " Moved: the length of the change of a token's input row; norm: the length of the row now."
    return (
        f"<p>{escape(note)}</p>\n"
        '<div class="tokens"><p class="tools"><label>Search <input type="search" placeholder="part of a token, '
        'or an id" autocomplete="off" spellcheck="false"></label> <output aria-live="polite"></output></p>\n'
        '<div class="wide" role="region" tabindex="0" aria-label="new tokens"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody></tbody></table></div>\n"
        '<p class="pager"><button type="button" data-step="-1">Previous</button> <span></span> '
        '<button type="button" data-step="1">Next</button></p>\n'
        "<noscript><p>The table is drawn by a script, which is switched off here.</p></noscript>\n"
        f'<script type="application/json">{as_json(data)}</script></div>\n'
    )


def _head(name: str) -> str:
    order = ' aria-sort="descending"' if name == "seen" else ""
    return f'<th scope="col" data-key="{name}"{order}><button type="button">{HEADS[name]}</button></th>'


def _fitting(records, tokens, old_tokens, room: int) -> tuple[dict, int]:
    """The columns of as many records as fit, and how many those are."""
    few = records[:FEW]
    each = len(as_json(_columns(few, tokens, old_tokens)).encode()) / len(few)
    count = min(len(records), int(2 * room / each) + 1)  # few records share few old tokens: each takes more there
    data = _columns(records[:count], tokens, old_tokens)
    size = len(as_json(data).encode())
    while size > room and count > 1:
        count = max(1, int(0.98 * count * room / size))
        data = _columns(records[:count], tokens, old_tokens)
        size = len(as_json(data).encode())
    return data, count


def _columns(records, tokens, old_tokens) -> dict:
    starts = list(dict.fromkeys(x["start"] for x in records))
    place = {start: number for number, start in enumerate(starts)}
    data = {
        "token": [show_token(tokens.get(x["id"])) for x in records],
        "id": [x["id"] for x in records],
        "start": [place[x["start"]] for x in records],
        "starts": starts,
    }
    if old_tokens is not None:
        used = list(dict.fromkeys(i for x in records for i in x["teacher_ids"]))
        place = {i: number for number, i in enumerate(used)}
        data["pieces"] = [[place[i] for i in x["teacher_ids"]] for x in records]
        data["old"] = [show_token(old_tokens.get(i)) for i in used]
    for name in FIGURES:
        if all(isinstance(x.get(name), int | float) for x in records):
            data[name] = [float(f"{x[name]:.4g}") if name != "seen" else x[name] for x in records]
    return data
