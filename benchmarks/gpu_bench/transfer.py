"""A transfer end to end: each way to train for the same time, then speed and waiting of the AIM engines.

    python3 benchmarks/gpu_bench/transfer.py MODEL TOKENIZER TRAIN.jsonl --held-out HELD_OUT.jsonl --minutes 5
    python3 benchmarks/gpu_bench/transfer.py MODEL … --parts ways --max-length 256 --batch-size 4 --seconds 300   a CPU
    python3 benchmarks/gpu_bench/transfer.py --dry-run     a tiny model on a CPU

MODEL is a folder, or one with a GGUF file cut into part00, part01 … (a large file is carried in pieces). Writes
transfer.jsonl into $OUT (else here), a line after each run; a run that fails is a line too, and the others go on.

`--seconds` are those of start and training together: what the start took is not there for the steps. They are the
wall's on a GPU, and this process's own (processor time) without one. A few steps of each way tell how many fit.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))
sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the tiny model of a dry run
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import matt_fast
from matt_fast.recipe.evaluating import evaluate_models

DRY = "--dry-run" in sys.argv
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time
TRIAL = 4 if DRY else 12 if torch.cuda.is_available() else 5  # steps
# name, arguments of TrainingOptions, arguments of transfer
SPEED = [
    ("aim, kernels", {"objective": "aim", "backend": "triton", "steps": 60}, {}),
    ("aim, torch engine", {"objective": "aim", "backend": "torch", "steps": 5}, {}),
    (
        "aim, kernels, packed 2,048",
        {"objective": "aim", "backend": "triton", "steps": 40, "packing": True},
        {"max_length": 2048, "batch_size": 8},
    ),
    ("aim, kernels, compile", {"objective": "aim", "backend": "triton", "steps": 30, "compile": True}, {}),
    ("healing, lora", {"steps": 0}, {"healing": "lora"}),
    ("healing, lora, compile", {"steps": 0, "compile": True}, {"healing": "lora"}),
    ("healing, full, compile", {"steps": 0, "compile": True}, {"healing": "full"}),
]
# name: the start, rows alone (arguments of TrainingOptions) or rows and layers (of HealingOptions)
LORA = {"method": "lora", "lr": 2e-3, "rows_lr": 3e-3}
FULL = {"method": "full", "lr": 1e-4, "rows_lr": 1e-3}
WAYS = {
    "composed, full, segment-kl+ntp": ("composed", FULL | {"objective": "segment-kl+ntp"}),
    "composed, full, segment-kl": ("composed", FULL | {"objective": "segment-kl"}),
    "composed, lora, segment-kl+ntp": ("composed", LORA | {"objective": "segment-kl+ntp"}),
    "composed, rows, segment-kl": ("composed", {"objective": "segment-kl", "lr": 3e-3}),
    "composed, full, boundary-kl+alm": ("composed", FULL | {"objective": "boundary-kl+alm"}),
    "contextual, lora, boundary-kl+ntp": ("contextual", LORA | {"objective": "boundary-kl+ntp"}),
    "contextual, full, boundary-kl+alm": ("contextual", FULL | {"objective": "boundary-kl+alm"}),
    "mean, lora, ntp": ("mean", LORA | {"objective": "ntp"}),
    "mean, rows, token-distillation": ("mean", {"objective": "token-distillation", "lr": 3e-3}),
    "mean, rows, aim": ("mean", {"objective": "aim", "lr": 1e-3}),
    "mean, lora, alm": ("mean", LORA | {"objective": "alm"}),
    "mean, rows, ntp": ("mean", {"objective": "ntp", "lr": 3e-3}),
    "focus, full, ntp": ("focus", FULL | {"objective": "ntp"}),
    "composed, lora, ntp": ("composed", LORA | {"objective": "ntp"}),
    "composed, full, ntp": ("composed", FULL | {"objective": "ntp"}),
}


def joined(folder: Path, work: Path) -> Path:
    """The model's folder; from the parts of a GGUF file, in float32, if there are some."""
    parts = sorted(folder.glob("part*"))
    if not parts:
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw, found = work / "gguf", work / "model"
    raw.mkdir()
    with (raw / "model.gguf").open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(raw, gguf_file="model.gguf", dtype=torch.float32)
    del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(found)
    AutoTokenizer.from_pretrained(raw, gguf_file="model.gguf").save_pretrained(found)
    return found


def tiny(work: Path) -> tuple[Path, Path, Path, Path]:
    from tiny import TEXTS, new_tokenizer, save_tiny_model

    model, tokenizer, data, held_out = (work / x for x in ("model", "tokenizer", "data.jsonl", "held-out.jsonl"))
    save_tiny_model(model)
    new_tokenizer().save_pretrained(tokenizer)
    data.write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS))
    held_out.write_text(json.dumps({"text": "class Held:\n    def out(self):\n        return None\n" * 20}))
    return model, tokenizer, data, held_out


def run(options, arguments: dict, output: Path) -> dict:
    """One transfer, and what is worth knowing of it; speed is that of the second half of its steps."""
    ticks, began = [], CLOCK()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    def tick(progress) -> None:
        ticks.append((CLOCK(), progress.tokens, progress.loss))

    shared = {"max_length": options.max_length, "batch_size": options.batch_size, "checkpoint_every": 10**9}
    result = matt_fast.transfer(
        options.model, options.tokenizer, options.data, output, on_step=tick, **shared | arguments
    )  # fmt: skip
    found = {"by clock": CLOCK() - began, "seconds": result.seconds}
    if ticks:
        progress = result.progress if result.healing is None else result.healing.progress
        half = len(ticks) // 2
        (first, before, _), (last, after, loss) = ticks[half], ticks[-1]
        seconds, steps = max(last - first, 1e-9), max(len(ticks) - 1 - half, 1)
        found |= {"tokens/s": (after - before) / seconds, "ms a step": 1e3 * seconds / steps, "steps": len(ticks)}
        found |= {"waiting": progress.waiting, "padding": progress.padding, "loss": [ticks[0][2], loss]}
        found |= {"peak MiB": result.peak_memory / 2**20}
    return found


def scores(options, model: Path) -> dict:
    """Bits per byte of a model on the texts that were given."""
    texts = {"held out": options.held_out, "english": options.english}
    texts = {name: text for name, text in texts.items() if text is not None}
    if not texts:
        return {}
    measured = evaluate_models({"model": str(model)}, texts, pieces=2 if DRY else 15)
    return {name: found["model"].evaluation.bits_per_byte for name, found in measured.texts.items()}


def way(arguments: dict, steps: int) -> dict:
    """Arguments of a transfer that trains in a way of WAYS."""
    if "method" in arguments:
        healing = matt_fast.HealingOptions(**arguments, steps=steps, max_worse=None)
        return {"training": matt_fast.TrainingOptions(steps=0), "healing": healing}
    return {"training": matt_fast.TrainingOptions(**arguments, steps=steps)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    for name in ("model", "tokenizer", "data"):
        add(name, type=Path, nargs="?" if DRY else None)
    add("--held-out", type=Path)
    add("--english", type=Path, help="text of another kind")
    add("--parts", nargs="+", choices=("speed", "ways"), default=["ways", "speed"])
    add("--ways", nargs="+", type=int, default=list(range(len(WAYS))), help="numbers in WAYS")
    add("--seeds", nargs="+", type=int, default=[0], help="each way once with each")
    add("--seconds", type=float, default=1 if DRY else 60, help="of start and training for each way")
    add("--max-length", type=int, default=32 if DRY else 512)
    add("--batch-size", type=int, default=2 if DRY else 16)
    add("--minutes", type=float, default=5, help="runs not begun by then are left out")
    add("--dry-run", action="store_true")
    return parser.parse_args()


def main() -> None:
    options, failed = parse(), 0
    deadline = time.monotonic() + 60 * options.minutes
    work = Path(tempfile.mkdtemp(prefix="gpu-transfer-"))
    if DRY:
        options.model, options.tokenizer, options.data, options.held_out = tiny(work)
    options.model = joined(options.model, work)
    report = Path(os.environ.get("OUT", "."), "transfer.jsonl")

    def noted(name: str, arguments: dict, *, scored: bool = False) -> dict | None:
        nonlocal failed
        began, record = time.perf_counter(), {"run": name}
        output = work / f"run-{time.monotonic_ns()}"
        if time.monotonic() > deadline:
            record["not run"] = f"{options.minutes:g} minutes were over"
        else:
            try:
                record |= run(options, {"completions": 0} | arguments, output) | {"output": str(output)}
                if scored:
                    record["bits per byte"] = scores(options, output)
            except Exception as error:
                traceback.print_exc(limit=-8, file=sys.stdout)
                record["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        failed += "error" in record
        record["all seconds"] = time.perf_counter() - began
        print(json.dumps(record), flush=True)
        with report.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record if "output" in record else None

    ways = [list(WAYS.items())[x] for x in options.ways] if "ways" in options.parts else []
    if ways:
        print(json.dumps({"run": "original", "bits per byte": scores(options, options.model)}), flush=True)
    starts: dict[str, tuple[Path | str, float]] = {}  # the rows, and what they took
    for start in dict.fromkeys(start for _, (start, _) in ways):
        alone = {"init": start, "training": matt_fast.TrainingOptions(steps=0)}
        made = noted(f"start: {start}", alone, scored=True)
        starts[start] = (Path(made["output"]), made["by clock"]) if made else (start, 0.0)
    pace: dict[str, float] = {}
    for seed in options.seeds:
        for name, (start, arguments) in ways:
            rows, took = starts[start]
            if name not in pace:
                trial = noted(f"trial: {name}", way(arguments, TRIAL) | {"init": rows})
                pace |= {name: trial["ms a step"]} if trial else {}
            if name in pace:
                steps = max(2, int(1e3 * (options.seconds - took) / pace[name]))
                given = way(arguments, min(steps, 5) if DRY else steps) | {"init": rows, "seed": seed}
                noted(f"{options.seconds:g} s, {took:.0f} of them the start, seed {seed}: {name}", given, scored=True)
    for name, training, more in SPEED if "speed" in options.parts else ():
        if DRY:
            training |= {"compile": False} | ({"steps": 2} if training["steps"] else {})
            more = more | ({"max_length": 64, "batch_size": 2} if "max_length" in more else {})
        if "healing" in more:
            method = {"lora": LORA, "full": FULL}[more["healing"]] | {"objective": "segment-kl+ntp"}
            more = more | {"healing": way(method, 2 if DRY else 40)["healing"]}
        noted(f"speed: {name}", {"training": matt_fast.TrainingOptions(**training), **more})
    print(f"{failed} failed; {report}", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
