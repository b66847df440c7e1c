"""HTML pages that need nothing beside them: no script but their own, nothing loaded from anywhere."""

import hashlib
from base64 import b64encode
from html import escape

from matt_fast.support.plots import COLOURS, tint

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #111;
       background: #fff; }
h1 { font-size: 1.3em; } p { max-width: 50em; }
bdi { white-space: pre; }
"""
PALETTE = "".join(
    f".c{i} {{ background: {tint(colour)}; border-color: {colour}; }}\n" for i, colour in enumerate(COLOURS)
)


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, in which all that came from outside is escaped.
        style, script: of the page; the page's policy lets no other script run, and nothing be loaded.
    """
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
