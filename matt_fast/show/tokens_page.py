"""The new tokens of a transfer as an HTML table that can be sorted and searched."""

from collections import Counter
from html import escape

from matt_fast.initializers.omp import OUTLIER
from matt_fast.show.pages import page
from matt_fast.show.tokens import TokenRow

STYLE = """
body { max-width: none; font-size: 14px; }
table { border-collapse: collapse; margin-top: 1em; }
th { cursor: pointer; text-align: left; position: sticky; top: 0; background: #eee; white-space: nowrap; }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
bdi { background: #f2f2f2; border: 1px solid #ccc; border-radius: 3px; padding: 0 3px; margin: 0 1px;
      display: inline-block; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 30em; }
.near { display: inline-block; }
tr.outlier td:first-child { border-left: 4px solid #D55E00; }
input { font: inherit; padding: 4px 8px; width: 20em; }
small { color: #555; }
"""
# Rows are ordered by data-value, so that nothing of a token is ever read as markup.
SCRIPT = """
const body = document.querySelector('tbody'), rows = [...body.rows], shown = document.querySelector('output');
const search = document.querySelector('input');
function filter() {
  const wanted = search.value.toLowerCase().replaceAll(' ', '\\u2423');
  let count = 0;
  for (const row of rows) { row.hidden = !row.dataset.token.includes(wanted); count += !row.hidden; }
  shown.value = count;
}
search.addEventListener('input', filter);
document.querySelectorAll('th').forEach((head, column) => {
  let up = head.dataset.kind === 'text';
  head.addEventListener('click', () => {
    const key = row => row.cells[column].dataset.value ?? '';
    const text = (a, b) => key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0;
    const number = (a, b) => Number(key(a)) - Number(key(b));
    const order = head.dataset.kind === 'text' ? text : number, sign = up ? 1 : -1;
    up = !up;
    rows.sort((a, b) => sign * order(a, b));
    body.append(...rows);
  });
});
filter();
"""
COLUMNS = (("token", "text"), ("id", "number"), ("start", "text"), ("old tokens", "text"), ("seen", "number"),
           ("norm", "number"), ("moved", "number"), ("nearest at the start", "none"), ("nearest now", "none"),
           ("outlier", "number"))  # fmt: skip


def tokens_page(tokens: list[TokenRow], of_all: int, note: str) -> str:
    """HTML with a row for each token.

    Args:
        tokens: in the order to begin with.
        of_all: how many new tokens there are.
        note: what "moved" is measured from.
    """
    starts = ", ".join(f"{count:,} {start}" for start, count in Counter(x.start for x in tokens).most_common())
    outside = sum(x.stands_out for x in tokens)
    heads = "".join(f'<th data-kind="{kind}">{name}</th>' for name, kind in COLUMNS)
    body = (
        f"<p>{len(tokens):,} of {of_all:,} new tokens; how they started: {escape(starts) or 'none'}. "
        f"{sum(not x.seen for x in tokens):,} were never seen in training. {outside:,} stand out, with a mark on the "
        f"left: more than {OUTLIER:g} robust standard deviations in norm or change. "
        f"{escape(note)} Click on a heading to sort.</p>\n"
        '<p><input type="search" placeholder="search tokens" aria-label="search tokens"> <output></output> shown</p>\n'
        f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{''.join(map(_row, tokens))}</tbody>\n</table>"
    )
    return page("New tokens", body, STYLE, SCRIPT)


def _row(token: TokenRow) -> str:
    cells = [
        _cell(_token(token.token), token.token),
        _number(token.id, str(token.id)),
        _cell(escape(token.start), token.start),
        _cell("".join(map(_token, token.pieces)), " ".join(token.pieces)),
        _number(token.seen, f"{token.seen:,}"),
        _number(token.norm, f"{token.norm:.3f}"),
        _number(-1 if token.moved is None else token.moved, "" if token.moved is None else f"{token.moved:.3f}"),
        _cell(_near(token.before), ""),
        _cell(_near(token.after), ""),
        _number(token.outlier, f"{token.outlier:.1f}"),
    ]
    mark = ' class="outlier"' if token.stands_out else ""
    return f'<tr{mark} data-token="{escape(token.token.lower())}">{"".join(cells)}</tr>\n'


def _near(found: tuple[tuple[str, float], ...]) -> str:
    return " ".join(f'<span class="near">{_token(token)}<small>{cosine:.2f}</small></span>' for token, cosine in found)


def _token(text: str) -> str:
    return f"<bdi>{escape(text)}</bdi>"


def _cell(inside: str, value: str) -> str:
    return f'<td data-value="{escape(value)}">{inside}</td>'


def _number(value: float, shown: str) -> str:
    return f'<td class="number" data-value="{value}">{shown}</td>'
