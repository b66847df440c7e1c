"""What each recipe makes of the quickstart's job: SmolLM2-135M with German tokens, on a CPU or a GPU.

    .venv/bin/python benchmarks/bench_recipes.py [--recipes quick paper best] [--add 500] [--at-most 60] [--seeds 0 1 2]

Each runs as a command of its own; "processor time" is all of it, with the evaluations, "seconds" are by the clock for
start, data and training. `--at-most` bounds steps, healing steps and texts that the model writes for every
recipe, so that a CPU comes to an end; without it the recipes are as they are.
"""

import argparse
import json
import resource
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
    """The options with no more than `at_most` steps of either kind and texts of the model's own."""
    if at_most is None:
        return options
    recipe = RECIPES[options[1]] if options[0] == "--recipe" else {}
    bound = {"steps": recipe.get("steps", TrainingOptions().steps)}
    bound |= {name: recipe[name] for name in ("heal_steps", "rehearse") if name in recipe}
    return [*options, *(x for name, n in bound.items() for x in (f"--{name.replace('_', '-')}", f"{min(n, at_most)}"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--add", type=int, default=500)
    parser.add_argument("--at-most", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    model = quickstart.fetch_model()
    training, german, english = manuals(quickstart.CACHE)
    print("| recipe | seed | German: before, start, after | English: before, start, after", end=" | ")
    print("seconds | processor time, s | peak, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.extend(model, Path(folder, "tokenizer"), data=training, add=given.add)
        for name in given.recipes:
            for seed in given.seeds:
                output = Path(folder, f"{len(list(Path(folder).iterdir()))}")
                command = [sys.executable, "-m", "matt_fast", "transfer", "--model", model, "--data", training]
                command += ["--tokenizer", Path(folder, "tokenizer"), "--output", output, "--seed", seed, "--json"]
                command += ["--quiet", "--eval-data", f"German={german}", "--eval-data", f"English={english}"]
                command += bounded(OPTIONS[name], given.at_most)
                before = processor_time()
                ended = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
                if ended.returncode:
                    sys.exit(f"{name}: the transfer ended with {ended.returncode}; what it says is above")
                print(row(name, seed, ended.stdout, processor_time() - before), flush=True)


def processor_time() -> float:
    """Seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(name: str, seed: int, printed: str, processor: float) -> str:
    """A line of the table, from what `--json` prints."""
    result = json.loads(printed)
    texts = [result["evaluations"], *result["other_texts"].values()]
    stages = ("original", "initialised", "trained")
    figures = (" ".join(f"{text[stage]['bits_per_byte']:.4f}" for stage in stages) for text in texts)
    training = sum(result["seconds"].get(stage, 0.0) for stage in ("initialisation", "data", "training", "healing"))
    cells = [name, seed, *figures, f"{training:.0f}", f"{processor:.0f}", f"{result['peak_memory'] / 2**30:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
