"""Texts in languages that differ in kind, from Debian packages (licences: as the packages say, GPL and CC BY-SA).

Paragraphs that are not translated are left out by their letters. What is held out is another document than those
trained on: another manual, or where there is none the help of another application.
"""

import random
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from debian_packages import files_of
from german_text import plain
from manuals import write_texts

SHORTEST, PARAGRAPHS = 40, 12  # characters of a paragraph; paragraphs of a document
MOST = 400_000  # characters to train on
HANDBOOK, FAQ, GNOME = "html/{}/*.html", "FAQ/{}/*.html", "help/{}/gnome-help/*.page"
OFFICE, OFFICE_HELD_OUT = "help/{}/text/s[bchw]*/**/*.html", "help/{}/text/s[im]*/**/*.html"


@dataclass(frozen=True)
class Language:
    """Where its text is: (package, pattern of files) to train on and held out, and whose letters mark it.

    Attributes:
        letters: of the beginnings of its letters' Unicode names, or of a regular expression.
        share: of a paragraph's letters that are such, at least.
    """

    name: str
    train: tuple[str, str]
    held_out: tuple[str, str]
    letters: str
    share: float = 0.6


def handbook(name: str, code: str, held_out: tuple[str, str], letters: str, share: float = 0.6) -> Language:
    return Language(name, ("debian-handbook", HANDBOOK.format(code)), held_out, letters, share)


def office(name: str, code: str, held_out: tuple[str, str] | None, letters: str, share: float = 0.6) -> Language:
    package = f"libreoffice-help-{code}"
    return Language(
        name, (package, OFFICE.format(code)), held_out or (package, OFFICE_HELD_OUT.format(code)), letters, share
    )


def faq(code: str) -> tuple[str, str]:
    return f"debian-faq-{code}", FAQ.format(code)


def gnome(code: str) -> tuple[str, str]:
    return "gnome-user-docs", GNOME.format(code)


ACCENTED = "LATIN SMALL LETTER .* WITH"
LANGUAGES = {
    "es": handbook("Spanish", "es-ES", gnome("es"), ACCENTED, 0.01),
    "pl": office("Polish", "pl", gnome("pl"), ACCENTED, 0.03),
    "vi": office("Vietnamese", "vi", gnome("vi"), ACCENTED, 0.1),
    "el": office("Greek", "el", gnome("el"), "GREEK"),
    "ru": handbook("Russian", "ru-RU", faq("ru"), "CYRILLIC"),
    "fa": handbook("Persian", "fa-IR", gnome("fa"), "ARABIC"),
    "hi": office("Hindi", "hi", None, "DEVANAGARI"),
    "km": office("Khmer", "km", None, "KHMER"),
    "ko": office("Korean", "ko", faq("ko"), "HANGUL"),
    "ja": handbook("Japanese", "ja-JP", faq("ja"), "CJK|HIRAGANA|KATAKANA"),
    "zh": handbook("Chinese", "zh-CN", faq("zh-cn"), "CJK"),
}


def language_text(folder: Path, code: str) -> tuple[Path, Path]:
    """(text to train on, held-out text) of a language as JSON lines in `folder`, made the first time."""
    language, paths = LANGUAGES[code], (folder / f"{code}-train.jsonl", folder / f"{code}-held-out.jsonl")
    if not all(path.exists() for path in paths):
        held_out = paragraphs(language, language.held_out)
        train = [x for x in paragraphs(language, language.train) if x not in set(held_out)]
        write(paths[0], train, MOST)
        write(paths[1], held_out, MOST)
    return paths


def paragraphs(language: Language, place: tuple[str, str]) -> list[str]:
    """Paragraphs in the language, each once."""
    found = {}
    for _, page in files_of([place[0]], place[1]):
        for paragraph in plain(re.sub(r"\s+", " ", page)).split("\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST and is_of(text, language):
                found[text] = None
    return list(found)


def is_of(text: str, language: Language) -> bool:
    letters = [x for x in unicodedata.normalize("NFC", text) if unicodedata.category(x)[0] in "LM"]
    return sum(is_letter(x, language.letters) for x in letters) >= max(1, language.share * len(letters))


@cache
def is_letter(character: str, letters: str) -> bool:
    return re.match(letters, unicodedata.name(character.lower()[0], "")) is not None


def write(path: Path, texts: list[str], most: int) -> None:
    """Documents of some paragraphs that stand together, in an order drawn once, up to a number of characters."""
    documents = ["\n".join(texts[start : start + PARAGRAPHS]) for start in range(0, len(texts), PARAGRAPHS)]
    random.Random(0).shuffle(documents)
    kept, size = [], 0
    for document in documents:
        if size < most:
            kept.append(document)
            size += len(document)
    write_texts(path, kept)
