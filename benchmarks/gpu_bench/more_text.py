"""Enough text for ten minutes of a GPU: code of installed packages, a quarter of the characters English prose.

Prose comes from Debian's packages of the Linux and Python documentation. Code that has lines of a held-out text is left
out: packages carry copies of the standard library's modules.
"""

import json
import lzma
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from debian_packages import files_of
from manuals import prose

PACKAGES = "linux-doc-6.1", "python3.11-doc"
SMALLEST, LARGEST = 2_000, 60_000  # characters of a module; longer ones are tables for the most part
WIDE = 40  # characters of a line that says where a text is from
COMMON = 3  # texts that share so many of them with a held-out one are its copies
ENGLISH = 0.25


def write_more_text(path: Path, held_out: Path, characters: int) -> None:
    """JSON lines, compressed by xz, in an order by chance.

    Raises:
        subprocess.CalledProcessError: Debian's packages could not be fetched.
    """
    known = {line for row in held_out.open(encoding="utf-8") for line in _telling(json.loads(row)["text"])}
    chance = random.Random(0)
    english = _some(list(_english()), ENGLISH * characters, chance)
    code = _some([x for x in _code() if len(known & _telling(x)) < COMMON], (1 - ENGLISH) * characters, chance)
    texts = english + code
    chance.shuffle(texts)
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    print(f"{path}: {sum(map(len, english)):,} characters of English and {sum(map(len, code)):,} of code")


def _some(texts: list[str], characters: float, chance: random.Random) -> list[str]:
    chance.shuffle(texts)
    found, together = [], 0
    for text in texts:
        if together >= characters:
            break
        found.append(text)
        together += len(text)
    return found


def _telling(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= WIDE}


def _code() -> Iterator[str]:
    seen = set()
    for file in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if SMALLEST <= len(text) <= LARGEST and text not in seen:
            seen.add(text)
            yield text


def _english() -> Iterator[str]:
    for _, text in files_of(PACKAGES, "*.rst*"):
        yield from prose(text)
