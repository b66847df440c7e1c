"""What all pages of this room look like, page.css, and what they do, page.js."""

from importlib.resources import files

from matt_fast.show.pages import page
from matt_fast.show.segments_page import STYLE


def framed(title: str, body: str) -> str:
    """A whole page, with a button for its colours.

    Args:
        title: plain text.
        body: HTML, in which all that came from outside is escaped.
    """
    folder = files("matt_fast.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    colours = '<button type="button" id="theme" hidden>Colours: as the system</button>'
    return page(title, colours + body, STYLE + style, script)
