"""What transfer.py needs on a machine with a GPU and no network, in two folders of at most 64 MiB.

    .venv/bin/python benchmarks/gpu_bench/pack.py FOLDER [--python 312]

FOLDER/one has the first half of SmolLM2's file, and much text: code with English prose among it (more_text.py).
FOLDER/two has the second half, wheels that such a machine may lack, the standard library and German manuals to train on
and held out, and tokenizers of 24,000 tokens for both. There, with both halves in /tmp/parts and the repository's root
as the current folder:

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/two/wheels/*.whl
    export PYTHONPATH=/tmp/site:.:kernels:benchmarks
    python3 benchmarks/gpu_bench/transfer.py /tmp/parts FOLDER/two/code FOLDER/two/code-train.jsonl.xz \\
        --held-out FOLDER/two/code-held-out.jsonl.xz --english FOLDER/two/english.jsonl.xz

and with the same names for german. Ten minutes of one way want the much text (kept from the first call in /tmp):

    … /tmp/parts FOLDER/two/code /tmp/more.jsonl.xz … --parts ways --ways 0 --seconds 600 --minutes 1
"""

import argparse
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]

MORE_CHARACTERS = 90_000_000
WHEELS = "datasets", "dill", "multiprocess", "gguf"


def halve(file: Path, folders: tuple[Path, Path]) -> None:
    """Write a file as part00 and part01, one into each folder."""
    content = file.read_bytes()
    middle = (len(content) + 1) // 2
    for number, (folder, part) in enumerate(zip(folders, (content[:middle], content[middle:]), strict=True)):
        (folder / f"part{number:02}").write_bytes(part)


def compress(source: Path, target: Path) -> None:
    with source.open("rb") as file, lzma.open(target, "wb") as packed:
        shutil.copyfileobj(file, packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="312", help="version of the other machine's Python")
    given = parser.parse_args()
    from bench_objectives import tokenizer_of
    from code_text import write_corpus
    from german_text import german_text
    from manuals import manuals
    from more_text import write_more_text
    from quickstart import CACHE, fetch_gguf

    folders = given.folder / "one", given.folder / "two"
    for folder in folders:
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        halve(fetch_gguf(Path(temporary)), folders)
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version", given.python, "--dest", folders[1] / "wheels"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted, *WHEELS], check=True)
    compress(manuals(CACHE)[2], folders[1] / "english.jsonl.xz")
    for name, (train, held_out) in {"code": write_corpus()[:2], "german": german_text(CACHE)}.items():
        texts = [json.loads(line)["text"] for line in train.open(encoding="utf-8")]
        tokenizer_of(texts).save_pretrained(folders[1] / name)
        for source, kind in ((train, "train"), (held_out, "held-out")):
            compress(source, folders[1] / f"{name}-{kind}.jsonl.xz")
    write_more_text(folders[0] / "more.jsonl.xz", write_corpus()[1], MORE_CHARACTERS)
    for folder in folders:
        size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
