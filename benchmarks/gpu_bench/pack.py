"""What transfer.py needs on a machine with a GPU and no network, in two folders of some 60 MB.

    .venv/bin/python benchmarks/gpu_bench/pack.py FOLDER [--python 312]

FOLDER/one has the first half of SmolLM2's file; FOLDER/two the second half, wheels that such a machine may lack, a
tokenizer of 24,000 tokens for code, and text. There, with both halves in /tmp/parts and the repository's root as the
current folder:

    python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/two/wheels/*.whl
    export PYTHONPATH=/tmp/site:.:kernels:benchmarks
    python3 benchmarks/gpu_bench/transfer.py /tmp/parts FOLDER/two/tokenizer FOLDER/two/stdlib-train.jsonl \\
        --held-out FOLDER/two/stdlib-held-out.jsonl --english FOLDER/two/english.jsonl
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]

WHEELS = "datasets", "dill", "multiprocess", "gguf"


def halve(file: Path, folders: tuple[Path, Path]) -> None:
    """Write a file as part00 and part01, one into each folder."""
    content = file.read_bytes()
    middle = (len(content) + 1) // 2
    for number, (folder, part) in enumerate(zip(folders, (content[:middle], content[middle:]), strict=True)):
        (folder / f"part{number:02}").write_bytes(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="312", help="version of the other machine's Python")
    given = parser.parse_args()
    from bench_objectives import tokenizer_of
    from code_text import write_corpus
    from manuals import manuals
    from quickstart import CACHE, fetch_gguf

    folders = given.folder / "one", given.folder / "two"
    for folder in folders:
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        halve(fetch_gguf(Path(temporary)), folders)
    wanted = ["--no-deps", "--only-binary=:all:", "--python-version", given.python, "--dest", folders[1] / "wheels"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted, *WHEELS], check=True)
    train, held_out, texts = write_corpus()
    tokenizer_of(texts).save_pretrained(folders[1] / "tokenizer")
    for source, name in ((train, train.name), (held_out, held_out.name), (manuals(CACHE)[2], "english.jsonl")):
        shutil.copy(source, folders[1] / name)
    for folder in folders:
        size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
