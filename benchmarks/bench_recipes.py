"""What each recipe makes of the quickstart's job: SmolLM2-135M with German tokens, on a CPU or a GPU.

    .venv/bin/python benchmarks/bench_recipes.py [--recipes quick,paper,best] [--add 500] [--at-most 60] [--seeds 0,1,2]

Each runs as a command of its own. `--at-most` bounds steps and healing steps of every recipe, so that a CPU comes to an
end; without it the recipes are as they are.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quickstart  # isort: skip
from manuals import manuals  # isort: skip

from matt_fast import TrainingOptions, tokenizers
from matt_fast.recipe.recipes import RECIPES

OPTIONS = {name: ["--recipe", name] for name in RECIPES} | {
    "rows only (token-distillation)": ["--max-length", "256"],
    "rows only (alm)": ["--objective", "alm", "--lr", "1e-3", "--max-length", "256"],
    "lora, segment-kl": ["--recipe", "quick", "--heal-objective", "segment-kl"],
    "lora, alm": ["--recipe", "quick", "--heal-objective", "alm"],
    "lora, boundary-kl+ntp": ["--recipe", "quick", "--heal-objective", "boundary-kl+ntp"],
    "lora, segment-kl+ntp": ["--recipe", "quick", "--heal-objective", "segment-kl+ntp"],
}


def bounded(options: list[str], at_most: int | None) -> list[str]:
    """The options with no more steps of either kind than `at_most`."""
    if at_most is None:
        return options
    recipe = RECIPES[options[1]] if options[0] == "--recipe" else {}
    steps = {"steps": recipe.get("steps", TrainingOptions().steps)} | {
        x: recipe[x] for x in recipe if x == "heal_steps"
    }
    return [*options, *(x for name, n in steps.items() for x in (f"--{name.replace('_', '-')}", f"{min(n, at_most)}"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(OPTIONS))
    parser.add_argument("--add", type=int, default=500)
    parser.add_argument("--at-most", type=int)
    parser.add_argument("--seeds", default="0")
    given = parser.parse_args()
    model = quickstart.fetch_model()
    training, german, english = manuals(quickstart.CACHE)
    print("| recipe | seed | German: before, start, after | English: before, start, after | seconds | peak, GiB |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.extend(model, Path(folder, "tokenizer"), data=training, add=given.add)
        for name in given.recipes.split(","):
            for seed in given.seeds.split(","):
                output = Path(folder, f"{len(list(Path(folder).iterdir()))}")
                command = [sys.executable, "-m", "matt_fast", "transfer", "--model", model, "--data", training]
                command += ["--tokenizer", Path(folder, "tokenizer"), "--output", output, "--seed", seed, "--json"]
                command += ["--quiet", "--eval-data", f"German={german}", "--eval-data", f"English={english}"]
                command += bounded(OPTIONS[name], given.at_most)
                ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                print(row(name, seed, ended.stdout), flush=True)


def row(name: str, seed: str, printed: str) -> str:
    """A line of the table, from what `--json` prints."""
    result = json.loads(printed)
    texts = [result["evaluations"], *result["other_texts"].values()]
    stages = ("original", "initialised", "trained")
    figures = (" ".join(f"{text[stage]['bits_per_byte']:.4f}" for stage in stages) for text in texts)
    training = sum(result["seconds"].get(stage, 0.0) for stage in ("initialisation", "data", "training", "healing"))
    return f"| {name} | {seed} | {' | '.join(figures)} | {training:.0f} | {result['peak_memory'] / 2**30:.2f} |"


if __name__ == "__main__":
    main()
