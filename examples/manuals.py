"""Prose of Debian's manuals (licence: GPL, as the packages say), in German and English, from Debian's package index."""

import gzip
import hashlib
import io
import json
import tarfile
import urllib.request
from pathlib import Path

MIRRORS = ("http://deb.debian.org/debian", "http://archive.debian.org/debian")
# package, its SHA-256, the text in it
GUIDE = (
    "pool/main/m/maint-guide/maint-guide-de_1.2.53_all.deb",
    "821afc6b85ffe9cbc9b7acbcdd5876ccbb855c3876ee5524d21602fd41d979c1",
    "maint-guide.de.txt.gz",
)
REFERENCE = (
    "pool/main/d/debian-reference/debian-reference-de_2.100_all.deb",
    "3b0ce65fd63e75ddf8eb07ca36293425135080e690a07e06a6ac8bc8040ef0aa",
    "debian-reference.de.txt.gz",
)
FAQ_GERMAN = (
    "pool/main/d/debian-faq/debian-faq-de_11.1_all.deb",
    "e9a8d8234f4b182660d521f80f50cea87f797b4541005a3d64fab7777766f6de",
    "debian-faq.de.txt.gz",
)
FAQ_ENGLISH = (
    "pool/main/d/debian-faq/debian-faq_11.1_all.deb",
    "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0",
    "debian-faq.en.txt.gz",
)
AR_HEADER = 60
SHORTEST, LETTERS = 100, 0.75  # characters of a paragraph, and the share of them that are letters: prose
PARAGRAPHS = 12  # of a document


def manuals(folder: Path) -> tuple[Path, Path, Path]:
    """(German to train on, German held out, English held out) as JSON lines in `folder`, made the first time."""
    parts = {"german-train": (REFERENCE, GUIDE), "german-held-out": (FAQ_GERMAN,), "english-held-out": (FAQ_ENGLISH,)}
    paths = [folder / f"{name}.jsonl" for name in parts]
    for path, packages in zip(paths, parts.values(), strict=True):
        if not path.exists():
            documents = [text for package in packages for text in prose(unpack(*package))]
            write_texts(path, documents)
    return tuple(paths)


def write_texts(path: Path, texts: list[str]) -> None:
    """Texts as JSON lines; the folder is made where there is none, and the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")
    path.with_suffix(".part").rename(path)


def unpack(package: str, digest: str, member: str) -> str:
    """A text out of a Debian package: an `ar` archive with a tar archive in it."""
    raw = fetch(package)
    if (found := hashlib.sha256(raw).hexdigest()) != digest:
        raise ValueError(f"{package}: wanted sha256 {digest}, got {found}")
    at = len(b"!<arch>\n")
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        body = raw[at + AR_HEADER : at + AR_HEADER + size]
        at += AR_HEADER + size + size % 2
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                (found,) = (x for x in archive.getmembers() if x.name.endswith(f"/{member}"))
                return gzip.decompress(archive.extractfile(found).read()).decode()
    raise ValueError(f"{package}: wanted a Debian package with data in it")


def fetch(package: str) -> bytes:
    """A file of Debian's package index, from the first mirror that has it."""
    errors = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}/{package}", timeout=60) as answer:
                return answer.read()
        except OSError as error:
            errors.append(f"{mirror}: {error}")
    raise OSError(f"{package} could not be fetched: {'; '.join(errors)}")


def prose(text: str) -> list[str]:
    """Documents of some paragraphs each, whose lines are joined; tables, commands and lists of links are left out."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    kept = [x for x in paragraphs if len(x) >= SHORTEST and sum(map(str.isalpha, x)) >= LETTERS * len(x)]
    return ["\n".join(kept[start : start + PARAGRAPHS]) for start in range(0, len(kept), PARAGRAPHS)]
