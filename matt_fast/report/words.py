"""Figures and names as a page has them."""

from html import escape
from pathlib import Path

NAME = "report.html"
NOTHING = "\N{EN DASH}"  # where there is no figure
DIGITS = 4  # of bits per byte that are compared, as they are shown
MINUTE, HOUR = 60, 3600


def last_part(place: object) -> str:
    """A folder or file by its last part, a hub name as it is."""
    text = str(place)
    return Path(text).name if text.startswith(("/", ".", "~")) or text.count("/") > 1 else text


def named(text: object) -> str:
    """A name in HTML."""
    return f"<code>{escape(str(text))}</code>"


def duration(seconds: float) -> str:
    """Seconds as one reads them: "12 s", "3 min 20 s", "5 h 12 min"."""
    seconds = round(seconds)
    if seconds < MINUTE:
        return f"{seconds} s"
    if seconds < HOUR:
        return f"{seconds // MINUTE} min {seconds % MINUTE} s"
    return f"{seconds // HOUR} h {seconds % HOUR // MINUTE} min"


def cell(inside: str, kind: str = "", head: bool = False) -> str:
    """A cell of a table. `inside` is HTML, `kind` its class."""
    tag = 'th scope="row"' if head else "td"
    style = f' class="{kind}"' if kind else ""
    return f"<{tag}{style}>{inside}</{tag[:2]}>"


def table(heads: list[str], rows: list[str], label: str, kind: str = "") -> str:
    """A table that scrolls within its own box where the page is narrow.

    Args:
        heads: HTML of the headings; the first is of the row heads.
        rows: HTML of cells, without <tr>.
        label: what the table shows, plain text.
        kind: class of the table.
    """
    names = "".join(f'<th scope="col">{x}</th>' for x in heads)
    body = "".join(f"<tr>{x}</tr>\n" for x in rows)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(label)}"><table class="{kind}">'
        f"<thead><tr>{names}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )
