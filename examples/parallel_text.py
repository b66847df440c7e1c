"""Parallel text without a web download: Debian's manuals and their translations, aligned by the pages' structure.

    python examples/parallel_text.py de parallel.jsonl
    matt-fast compare-inits … --init wechsel --init transtokenizers --parallel parallel.jsonl

writes pairs of an English text and its translation (de: German, ja: Japanese), sentences where both sides of a
paragraph have equally many, else paragraphs. The packages come by apt-get, so it needs Debian or Ubuntu.
"""

import argparse
import gzip
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from difflib import SequenceMatcher
from html.parser import HTMLParser
from pathlib import Path

# English folder: that of the translation, with {0} for the language and {1} for its locale. Packages are named first.
MANUALS = {
    "debian-reference-en/usr/share/debian-reference": "debian-reference-{0}/usr/share/debian-reference",
    "developers-reference/usr/share/developers-reference": (
        "developers-reference-{0}/usr/share/developers-reference/{0}"
    ),
    "debian-faq/usr/share/doc/debian/FAQ": "debian-faq-{0}/usr/share/doc/debian/FAQ/{0}",
    "maint-guide/usr/share/doc/maint-guide/html": "maint-guide-{0}/usr/share/doc/maint-guide-{0}/html",
    "gimp-help-en/usr/share/gimp/2.0/help/en": "gimp-help-{0}/usr/share/gimp/2.0/help/{0}",
    "debian-handbook/usr/share/doc/debian-handbook/html/en-US": (
        "debian-handbook/usr/share/doc/debian-handbook/html/{1}"
    ),
    "installation-guide-amd64/usr/share/doc/installation-guide-amd64/en": (
        "installation-guide-amd64/usr/share/doc/installation-guide-amd64/{0}"
    ),
}
LOCALES = {"de": "de-DE", "ja": "ja-JP"}
BLOCKS = {"p", "div", "li", "td", "th", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "pre", "table", "section", "title"}
NOT_PROSE = {"pre", "script", "style", "head", "title"}
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^\W\d_])|(?<=。)")


class _Blocks(HTMLParser):
    """The stretches of text between the tags of blocks, with the tags and links that they have in every language."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.links: list[str] = []
        self.blocks: list[tuple[tuple, str]] = []

    def _end_block(self) -> None:
        text = " ".join("".join(self.parts).split())
        if text and not NOT_PROSE & set(self.open):
            self.blocks.append(((self.open[-1] if self.open else "", *self.links), text))
        self.parts, self.links = [], []

    def handle_starttag(self, tag, attributes):
        if tag in BLOCKS | NOT_PROSE:
            self._end_block()
            self.open.append(tag)
        elif tag == "a" and (target := dict(attributes).get("href")):
            self.links.append(re.sub(r"\.[a-z]{2}(?=\.html)", "", target))

    def handle_endtag(self, tag):
        if tag in self.open:
            self._end_block()
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        self.parts.append(data)


def blocks(page: Path) -> list[tuple[tuple, str]]:
    content = gzip.decompress(page.read_bytes()) if page.suffix == ".gz" else page.read_bytes()
    parser = _Blocks()
    parser.feed(content.decode(errors="ignore"))
    parser._end_block()
    return parser.blocks


def pages(folder: Path) -> dict[str, Path]:
    """Name without the language -> file."""
    found = sorted(folder.rglob("*.html*"))
    return {re.sub(r"(\.[a-z]{2})?\.html(\.gz)?$", "", str(file.relative_to(folder))): file for file in found}


def page_pairs(source: Path, target: Path) -> Iterator[tuple[str, str]]:
    ours, theirs = blocks(source), blocks(target)
    matcher = SequenceMatcher(None, [key for key, _ in ours], [key for key, _ in theirs], autojunk=False)
    for first, second, size in matcher.get_matching_blocks():
        for (_, left), (_, right) in zip(ours[first : first + size], theirs[second : second + size], strict=True):
            if left != right:  # else not translated
                lefts, rights = SENTENCE_END.split(left), SENTENCE_END.split(right)
                yield from zip(lefts, rights, strict=True) if len(lefts) == len(rights) else [(left, right)]


def parallel_text(language: str) -> list[tuple[str, str]]:
    """(English, translation), each once."""
    translations = {english: folder.format(language, LOCALES[language]) for english, folder in MANUALS.items()}
    packages = sorted({folder.split("/")[0] for pair in translations.items() for folder in pair})
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        root.chmod(0o755)
        subprocess.run(["apt-get", "download", *packages], cwd=root, check=True)
        for package in root.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root / package.name.split("_")[0]], check=True)
        pairs = []
        for english, translation in translations.items():
            ours, theirs = pages(root / english), pages(root / translation)
            found = [pair for name in sorted(ours.keys() & theirs) for pair in page_pairs(ours[name], theirs[name])]
            print(f"{translation.split('/')[0]}: {len(found):,} pairs from {len(ours.keys() & theirs)} pages")
            pairs += found
    return list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("language", choices=sorted(LOCALES))
    parser.add_argument("output", type=Path)
    parser.add_argument("--without", type=Path, help="leave out pairs whose translation is in this held-out .jsonl")
    arguments = parser.parse_args()
    pairs = parallel_text(arguments.language)
    if arguments.without:
        lines = arguments.without.read_text().splitlines()
        held_out = " ".join(" ".join(json.loads(line)["text"].split()) for line in lines)
        pairs = [pair for pair in pairs if pair[1] not in held_out]
    rows = (json.dumps({"source": source, "target": target}, ensure_ascii=False) for source, target in pairs)
    arguments.output.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    print(f"{arguments.output}: {len(pairs):,} pairs, {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
