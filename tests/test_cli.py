"""What the command line refuses before anything slow."""

import inspect
import json
import subprocess
import sys
import typing

import pytest
import typer
from commands import PATHS, REQUIRED, message, run, stub_all

from matt_fast.cli import app
from matt_fast.cli.transfer import held_out_texts

WRONG = [
    (["--steps=x"], "--steps"),
    (["--bogus=1"], "No such option: --bogus"),
    (["--steps=-1"], "steps: wanted at least 0, got -1"),
    (["--lr=-1"], "lr: wanted a number above 0, got -1.0"),
    (["--lr=nan"], "lr: wanted a number above 0, got nan"),
    (["--objective=nonsense"], "objective: wanted one or more of aim"),
    (["--metric=l1"], "metric: wanted 'mse' with an objective that has no AIM loss"),
    (["--objective=aim", "--metric=l1"], "metric must be one of 'mse', 'cosine'"),
    (["--backend=cuda"], "backend must be one of 'auto'"),
    (["--layer=half"], "layer: wanted a number, 'third' or 'sweep', got 'half'"),
    (["--layer=0"], "n_layers: wanted at least 1, got 0"),
    (["--layer=sweep"], "eval_data: wanted held-out text to compare depths on"),
    (["--precision=fp16"], "precision: wanted one of auto, no, bf16, got 'fp16'"),
    (["--init-head=contextual"], "init_head: wanted one of same, boundary, mean, length-mean,"),
    (["--init=omp"], "donor: wanted a model with the new vocabulary for init 'omp'"),
    (["--init-head=linear-map"], "donor: wanted a model with the new vocabulary for init_head 'linear-map'"),
    (["--init-head=wechsel"], "parallel: wanted pairs of texts and translations for init_head 'wechsel'"),
    (["--init=wechsel"], "parallel: wanted pairs of texts"),
    (["--init=wechsel", "--parallel=pairs.tsv"], "parallel: wanted a .tsv or .jsonl file"),
    (["--init=rows.safetensors"], "init: wanted a file or folder that is there"),
    (["--data=text.jsonl"], "data: wanted a file or folder that is there"),
    (["--data=./text"], "data: wanted a file or folder that is there"),
    (["--model=some/deep/folder"], "model: wanted a file or folder that is there"),
    (["--tokenizer=<PreTrainedTokenizerFast>"], "tokenizer: wanted a file or folder that is there"),
    (["--eval-data=/no/such"], "eval_data: wanted a file or folder that is there"),
    (["--output=/proc/new/x"], "output: wanted a folder that can be written, got '/proc/new/x': No such file"),
    (["--max-length=0"], "max_length: wanted at least 1, got 0"),
    (["--epochs=0"], "epochs: wanted a number above 0, got 0.0"),
    (["--epochs=2", "--steps=5"], "steps and epochs: wanted one of them, got 5 and 2.0"),
    (["--eval-data=org/text", "--validate-every=auto"], "validate_every: wanted a number of steps, or a time"),
    (["--checkpoint-every=ten"], "checkpoint_every: wanted a number of steps, or a time"),
    (["--validate-every=5"], "validate_every: wanted eval_data with it"),
    (["--eval-data=org/text", "--patience=2"], "patience: wanted validate_every with it"),
    (["--track=tensorboard,wandbb"], "track: wanted one of tensorboard, wandb, trackio, got 'wandbb'"),
    (["--device=gpu"], "device: wanted cpu, cuda, cuda:1, mps or the like; got 'gpu'"),
    (["--resume=no-run"], "resume: wanted the output of a run that was begun"),
    (["--config=no.yaml"], "No such file or directory: 'no.yaml'"),
]


@pytest.mark.parametrize(
    ("arguments", "words"), WRONG, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_a_wrong_argument_is_named(called, arguments, words):
    refused = run("transfer", *PATHS, *arguments)
    assert refused.exit_code in (1, 2)
    assert words in message(refused)
    assert not called


MAY_BE_ZERO = {"seed", "data_workers", "completions", "few_shot", "steps", "heal_max_worse", "warmup_steps"}


MAY_BE_ZERO |= {"decay_steps", "max_grad_norm", "rehearse"}


MAY_BE_HUGE = {"lr", "max_grad_norm", "checkpoint_every", "validate_every"}


@pytest.mark.parametrize("command", ["transfer", "prepare", "evaluate", "plan", "compare-inits"])
def test_every_number_of_every_command_has_its_range(monkeypatch, tmp_path, command):
    stub_all(monkeypatch, ValueError("reached"))
    monkeypatch.chdir(tmp_path)
    numbers = []
    known = typer.main.get_command(app).commands[command]
    types = typing.get_type_hints(inspect.unwrap(known.callback))
    for option in known.params:
        kinds = {types.get(option.name), *typing.get_args(types.get(option.name))}
        if not kinds & {int, float} and option.name not in ("checkpoint_every", "validate_every", "layer"):
            continue
        numbers.append(option.name)
        values = ["0", "-1", "-3", "-1000000000000", str(10**30), "nan", "inf", "-inf", "1e300"]
        for value in values:
            ended = run(command, *REQUIRED[command], f"{option.opts[0]}={value}")
            allowed = (value == "0" and option.name in MAY_BE_ZERO) or (
                value in ("1e300", str(10**30)) and option.name in MAY_BE_HUGE
            )
            said = ended.stderr.replace("n_layers", "layer").replace("-", "_")
            assert "Traceback" not in said
            assert ended.exit_code == (1 if ended.stderr.startswith("Error: ") else 2), (option.name, value, said)
            if "reached" in said:
                assert allowed, (option.name, value)
            else:
                assert option.name in said, (option.name, value, said)
    assert len(numbers) == {"transfer": 28, "prepare": 3, "evaluate": 5, "plan": 11, "compare-inits": 7}[command]


def test_an_output_with_something_in_it_is_refused(called, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "file").touch()
    refused = run("transfer", *PATHS[:3], f"--output={tmp_path / 'output'}")
    assert "output: wanted a new or empty folder" in message(refused)
    (tmp_path / "output" / "run").mkdir()
    (tmp_path / "output" / "run" / "run.json").write_text("{}")
    refused = run("transfer", *PATHS[:3], f"--output={tmp_path / 'output'}")
    assert "holds a run that is not finished; go on with it: matt-fast transfer --resume" in message(refused)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    inside = f"--output={tmp_path / 'texts' / 'new'}"
    for name, texts in (("data", "--data=texts"), ("eval_data x", "--eval-data=x=texts")):
        refused = run("transfer", *PATHS[:3], texts, inside)
        assert f"output: wanted a folder outside of {name}, 'texts', got" in message(refused)
    refused = run("tokenizer", "train", "--data=texts", "--size=300", inside)
    assert "output: wanted a folder outside of data" in message(refused)
    assert not called


def test_arguments_are_checked_before_slow_imports(tmp_path):
    """In a process of its own, in which torch, transformers and datasets cannot be imported."""
    code = (
        "import contextlib, io, json, sys\n"
        "slow = ('torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'tokenizers')\n"
        "sys.modules |= dict.fromkeys(slow)\n"
        "from matt_fast.cli import app\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    said, status = io.StringIO(), None\n"
        "    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):\n"
        "        try: app(arguments)\n"
        "        except SystemExit as end: status = end.code\n"
        "    print(json.dumps([status, said.getvalue()]))\n"
    )
    model = ["--model=org/model", "--tokenizer=org/tokenizer"]
    for name in ("chat.jsonl", "table.tsv"):
        (tmp_path / name).write_text('{"messages": []}\n')
    chat, table, column = f"{tmp_path}/chat.jsonl", f"{tmp_path}/table.tsv", "text_field: wanted one of the columns"
    cases = (
        (["--help"], 0, "compare-inits"),
        (["--version"], 0, "matt-fast 0"),
        (["transfer", "--help"], 0, "While it runs"),
        (["transfer", *PATHS, "--objective=nonsense"], 1, "objective: wanted"),
        (["transfer", *PATHS, "--data=text.jsonl"], 1, "data: wanted"),
        (["transfer", *PATHS, f"--data={chat}"], 1, column),
        (["evaluate", "--model=x/y", f"--data={chat}", "--text-field=chat"], 1, column),
        (["tokenizer", "report", "x/y", f"--by=chats={table}"], 1, "by chats: wanted a file or folder with .txt, .md"),
        (["apply", "--from=x/y", "--to=x/z", f"--eval-data={table}", "--output=x"], 1, "eval_data: wanted a file"),
        (["apply", "--from=x/y", "--to=/x/z", "--output=x"], 1, "Error: to: wanted a file or folder that is there"),
        (["transfer", *PATHS, "--map=x"], 1, "Error: map: wanted"),
        (["transfer", "--model=x"], 2, "Missing option"),
        (["prepare", *PATHS, "--executor=x"], 1, "executor: wanted one of local, slurm, ray, got 'x'"),
        (["prepare", *PATHS, "--executor-option=x"], 1, "executor_option: wanted NAME=VALUE"),
        (["plan", *model, "--objective=x"], 1, "objective: wanted"),
        (["plan", *model, "--device=tpu"], 1, "device: wanted one of cuda, cpu, got 'tpu'"),
        (["plan", *model, "--batch=0"], 1, "batch: wanted at least 1"),
        (["compare-inits", *model, "--eval-data=x.txt", "--init=mean"], 1, "eval_data: wanted"),
        (["evaluate", "--model=x", "--data=x.txt"], 1, "data: wanted"),
        (["evaluate", "--model=x", "--data=-"], 1, "data: wanted a file or folder that is there"),
        (["transfer", *PATHS, "--eval-data="], 1, "eval_data: wanted a value, got an empty one"),
        (["tokenizer", "report", "org/model", "--output", ""], 1, "output: wanted a value, got an empty one"),
        (["push", "", "--to=me/new"], 1, "arguments: wanted a value, got an empty one"),
        (["evaluate", f"--model={chat}", "--prompts=x"], 1, "model: wanted a folder with config.json and weights, or"),
        (["plan", "--model=x/y", f"--tokenizer={chat}"], 1, "tokenizer: wanted a folder with tokenizer.json, that"),
        (
            ["show", "segments", "--old=x/y", f"--new={tmp_path}", "--text=x"],
            1,
            "wanted tokenizer.json in it, got chat",
        ),
        (
            ["tokenizer", "extend", "--model=x/y", f"--words={chat}", "--output=x"],
            1,
            "words: wanted a .txt or .md file",
        ),
        (["evaluate", "--model=x", "--data=x", "--limit=0"], 1, "limit: wanted at least 1"),
        (["tokenizer", "report", "org/model"], 1, "data: wanted text to tokenise"),
        (["show", "segments", "--old=a/b", "--new=c/d", "--text= "], 1, "text: wanted text"),
        (["show", "influence", "--text=x", "--head=x"], 1, "head: wanted a number"),
        (["show", "tokens", "x", "--sort=x"], 1, "sort: wanted one of"),
        (["show", "tokens", f"{tmp_path}"], 1, "folder: wanted the output of a finished transfer"),
        (["tokenizer", "extend", "--model=x/y", "--output=x"], 1, "data: wanted text to learn tokens from, or words"),
        (["transfer", *PATHS, "--init=meann"], 1, "init: wanted mean, length-mean"),
    )
    given = json.dumps([arguments for arguments, *_ in cases])
    done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (arguments, status, words), line in zip(cases, done.stdout.splitlines(), strict=True):
        ended, said = json.loads(line)
        assert (ended, words in said) == (status, True), (arguments, said)


def test_held_out_texts_by_name(tmp_path):
    (tmp_path / "a=b.txt").write_text("text")
    assert held_out_texts(None) is None
    assert held_out_texts([f"{tmp_path}/a=b.txt"]) == f"{tmp_path}/a=b.txt"  # a file that is there
    assert held_out_texts(["code=x.txt"]) == {"code": "x.txt"}
    assert held_out_texts(["code=x.txt", "prose=y=z.txt"]) == {"code": "x.txt", "prose": "y=z.txt"}
    for wrong in (["x.txt", "y.txt"], ["code=x.txt", "y.txt"], ["code=x.txt", "code=y.txt"]):
        with pytest.raises(ValueError, match="eval_data: wanted NAME=TEXT with another name for each text"):
            held_out_texts(wrong)
