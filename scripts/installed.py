"""What `make release-check` runs in an environment that has matt-fast from its wheel: a tiny transfer, end to end.

Runs in an empty folder outside the repository, with tests/tiny.py beside it, which makes the model and its tokenizer.
Prints the versions that it ran with as JSON, as its last line.
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

TOLD = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "safetensors", "numpy", "typer")
EXTRAS = ("triton", "gguf", "liger_kernel", "bitsandbytes", "matplotlib", "tensorboard", "fasttext", "deepfocus")
COMMON = ("--model=model", "--tokenizer=new", "--data=text.txt", "--max-length=64", "--batch-size=2")


def main() -> None:
    import matt_fast

    assert Path(matt_fast.__file__).is_relative_to(sys.prefix), f"not from the wheel: {matt_fast.__file__}"
    assert not [name for name in EXTRAS if find_spec(name)], "wanted an environment without any extra, and no Triton"
    for name in matt_fast.__all__:
        getattr(matt_fast, name)
    assert matt_fast.__version__ in command("--version")
    assert "transfer" in command("--help")

    from tiny import TEXTS, new_tokenizer, save_tiny_model

    save_tiny_model(Path("model"))
    new_tokenizer().save_pretrained("new")
    Path("text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    Path("held-out.txt").write_text("\n\n".join(TEXTS[::-1]).replace("alpha", "omega"), encoding="utf-8")

    assert "will fail" not in command("doctor", *COMMON)
    rows = ("--steps=3", "--packing")
    heal = ("--heal=lora", "--heal-steps=2", "--heal-objective=boundary-kl+alm")
    command("transfer", *COMMON, *rows, *heal, "--output=adapted")
    generate("adapted")
    here("transfer", *COMMON, "--steps=2", "--objective=aim+token-distillation", "--output=both")
    here("plan", "--model=model", "--tokenizer=new")
    here("evaluate", "--model=adapted", "--data=held-out.txt")
    here("tokenizer", "extend", "--model=model", "--data=text.txt", "--add=10", "--output=extended")
    said = {name: version(name) for name in TOLD}
    print(json.dumps({"python": platform.python_version(), **said}))


def command(*arguments: str) -> str:
    """What `matt-fast` printed, as a person starts it: by the script that the wheel installed."""
    program = Path(sys.executable).with_name("matt-fast")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"matt-fast {' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def here(*arguments: str) -> None:
    """The same in this process, where the libraries are loaded already."""
    from typer.testing import CliRunner

    from matt_fast.cli import app

    done = CliRunner().invoke(app, arguments)
    if done.exit_code:
        sys.exit(f"matt-fast {' '.join(arguments)}: exit status {done.exit_code}\n{done.output}{done.exception}")


def generate(folder: str) -> None:
    """Load the result as its user will, without matt-fast, and generate; the frozen rows are those of the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def function", return_tensors="pt")
    written = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 4
    weights = model.get_input_embeddings().weight
    assert weights.shape[0] >= len(tokenizer)
    assert torch.isfinite(weights).all()


if __name__ == "__main__":
    main()
