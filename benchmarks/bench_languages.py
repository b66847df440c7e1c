"""Other languages: what new tokens save and what the model makes of them, for languages that differ in kind.

    .venv/bin/python benchmarks/bench_languages.py [--languages es,ru] [--add 1000] [--steps 50]
        [--objective segment-kl] [--control] [--pieces 6]

SmolLM2-135M-Instruct; texts: `language_text`. Each is what a user would do: `tokenizer extend`, then `transfer --recipe
quick`. Without --steps there is no healing, only the tokens; with `--control` the original with its own tokenizer is
trained in the same way instead (a word that no text has is added, so that there is something to transfer).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from language_text import LANGUAGES, language_text
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart  # isort: skip
from manuals import manuals  # isort: skip

from matt_fast import tokenizers

TEXTS = quickstart.CACHE / "languages"
NO_WORD = "qzxjvkwqzxjvkw"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    parser.add_argument("--add", type=int, default=1000)
    parser.add_argument("--objective", default="ntp")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--pieces", type=int, default=6)
    given = parser.parse_args()
    model = quickstart.fetch_model()
    print("| language | tokens for 1,000 characters | bits per byte: original, start, after | English | processor, s |")
    print("|---|---|---|---|---|", flush=True)
    for code in given.languages.split(","):
        with tempfile.TemporaryDirectory() as folder:
            training, held_out = language_text(TEXTS, code)
            new = Path(folder, "tokenizer")
            if given.control:
                tokenizers.extend(model, new, words=[NO_WORD])
            else:
                tokenizers.extend(model, new, data=training, add=given.add, join_marks=True)
            figures = " → ".join(f"{per_thousand(x, held_out):,.0f}" for x in (model, new))
            trained = "" if given.steps is None else heal(given, model, new, training, code, held_out, folder)
            print(f"| {LANGUAGES[code].name} | {figures} |{trained or ' | | |'}", flush=True)


def per_thousand(tokenizer: Path, file: Path) -> float:
    """Tokens of 1,000 characters."""
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")]
    ids = AutoTokenizer.from_pretrained(tokenizer)(texts, add_special_tokens=False)["input_ids"]
    return 1000 * sum(map(len, ids)) / sum(map(len, texts))


def heal(given, model: Path, new: Path, training: Path, code: str, held_out: Path, folder: str) -> str:
    """The rest of a line: figures of `transfer --recipe quick`."""
    command = [sys.executable, "-m", "matt_fast", "transfer", "--recipe", "quick", "--model", model]
    command += ["--tokenizer", new, "--data", training, "--output", Path(folder, "output"), "--json", "--quiet"]
    command += ["--eval-data", f"{code}={held_out}", "--eval-data", f"English={manuals(quickstart.CACHE)[2]}"]
    command += ["--eval-pieces", given.pieces, "--completions", 0, "--heal-steps", given.steps]
    command += ["--heal-objective", given.objective, *(["--init", "mean"] if given.control else [])]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    result = json.loads(ended.stdout)
    stages = ("original", "initialised", "trained")
    texts = [result["evaluations"], *result["other_texts"].values()]
    of_texts = (", ".join(f"{text[stage]['bits_per_byte']:.3f}" for stage in stages) for text in texts)
    return f" {' | '.join(of_texts)} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
