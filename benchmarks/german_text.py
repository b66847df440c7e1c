"""German text without a web download: HTML documentation from Debian packages, by apt-get."""

import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from debian_packages import files_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from manuals import write_texts  # isort: skip

PACKAGES = [
    "debian-faq-de",
    "debian-handbook",
    "debian-reference-de",
    "developers-reference-de",
    "gimp-help-de",
    "installation-guide-amd64",
    "linuxcnc-doc-de",
    "maint-guide-de",
]
GERMAN = re.compile(r"(/de/|-de/|/de-DE/|\.de\.html|_de\.html|_de/)")
COMMON_WORDS = re.compile(r"\b(der|die|und|das|ist|nicht|werden|mit)\b")
BLOCKS = {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "pre", "dt", "dd"}
HIDDEN = {"script", "style", "head"}


class _Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag, attributes):
        self.hidden += tag in HIDDEN
        self.parts += ["\n"] * (tag in BLOCKS)

    def handle_endtag(self, tag):
        self.hidden -= tag in HIDDEN
        self.parts += ["\n"] * (tag in BLOCKS)

    def handle_data(self, data):
        self.parts += [data] * (self.hidden <= 0)


def plain(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    text = re.sub(r"[ \t\xa0]+", " ", "".join(parser.parts))
    return re.sub(r"\n\s*\n+", "\n", text).strip()


def german_text(folder: Path) -> tuple[Path, Path]:
    """(training text, held-out text) as JSON lines in `folder`, made the first time; 4.9 MB in all."""
    paths = folder / "de-train.jsonl", folder / "de-held-out.jsonl"
    if all(path.exists() for path in paths):
        return paths
    texts = []
    for file, page in files_of(PACKAGES, "*.html*"):
        if not GERMAN.search(str(file)):
            continue
        text = plain(page)
        if len(text) > 500 and len(COMMON_WORDS.findall(text)) > len(text) / 200:
            texts.append(text)
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)
    held_out = max(20, len(texts) // 25)
    for path, part in zip(paths, (texts[held_out:], texts[:held_out]), strict=True):
        write_texts(path, part)
    return paths
