"""The command line: what it refuses before anything slow, options from files, and what it prints."""

import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
import typing
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import typer
import yaml
from safetensors import SafetensorError
from tiny import TEXTS, new_tokenizer, save_tiny_model
from typer.testing import CliRunner

import matt_fast.recipe.transfer
from matt_fast import TrainingOptions, TransferResult
from matt_fast.cli import app
from matt_fast.cli.output import command_output, plain
from matt_fast.cli.transfer import held_out_texts
from matt_fast.data import shards
from matt_fast.data.reading import FORMATS
from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.recipe import arguments as by_value
from matt_fast.recipe.arguments import TEXT_FILES
from matt_fast.recipe.config import dump_config, load_config, resolved_config
from matt_fast.support.printable import printable
from matt_fast.training.loop import Progress

PATHS = ["--model=org/model", "--tokenizer=org/tokenizer", "--data=org/data", "--output=new-folder"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def message(result):
    """What was printed, without the frame and the line breaks of a terminal."""
    return " ".join(result.output.replace("│", " ").split())


WHERE = "--debug shows where it happened.\n"
BAD_BYTE = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid start byte")


def with_note(error, note):
    error.add_note(note)
    return error


def a_result(output):
    evaluation = Evaluation(2.5, 3.0, 100, 30, 2048, False)
    progress = Progress(3, 0.5, [0.9, 0.7, 0.5], {"aim": 0.5}, 300, 2.0, padding_tokens=10, all_tokens=100)
    return TransferResult(
        output=Path(output),
        n_layers=2,
        shared=5,
        new=3,
        unspelled=0,
        report=InitReport(5, 3, 0, 0),
        trainable=3,
        seen=2,
        progress=progress,
        evaluations={"original": evaluation, "trained": evaluation},
        seconds={"training": 2.0},
        training_memory=1 << 30,
        peak_memory=1 << 30,
    )


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Arguments of the calls of `transfer`, which does nothing; with those that it will have."""
    calls = []
    original = matt_fast.recipe.transfer.transfer
    names = ("resume", "device", "epochs", "checkpoint_every", "validate_every", "patience", "track")

    def transfer(**arguments):
        calls.append(arguments)
        arguments["on_stage"]("training")
        return a_result(arguments["output"])

    signature = inspect.signature(original)
    known = {name: signature.parameters[name] for name in signature.parameters if name != "on_initialise"}
    for name in (*names, "on_progress", "on_message"):
        known[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    transfer.__signature__ = inspect.Signature(known.values())
    monkeypatch.setattr(matt_fast.recipe.transfer, "transfer", transfer)
    monkeypatch.chdir(tmp_path)
    return calls


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
MAY_BE_ZERO |= {"decay_steps", "max_grad_norm"}
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
    assert len(numbers) == {"transfer": 27, "prepare": 3, "evaluate": 5, "plan": 10, "compare-inits": 7}[command]


def test_an_output_with_something_in_it_is_refused(called, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "file").touch()
    refused = run("transfer", *PATHS[:3], f"--output={tmp_path / 'output'}")
    assert "output: wanted a new or empty folder" in message(refused)
    (tmp_path / "output" / "run").mkdir()
    (tmp_path / "output" / "run" / "run.json").write_text("{}")
    refused = run("transfer", *PATHS[:3], f"--output={tmp_path / 'output'}")
    assert "holds a run that is not finished; go on with it: matt-fast transfer --resume" in message(refused)
    assert not called


def test_arguments_are_checked_before_slow_imports():
    """In a process of its own, in which torch, transformers and datasets cannot be imported."""
    code = (
        "import sys\n"
        "slow = ('torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'tokenizers')\n"
        "sys.modules |= dict.fromkeys(slow)\n"
        "from matt_fast.cli import app\n"
        "app(sys.argv[1:])"
    )
    model = ["--model=org/model", "--tokenizer=org/tokenizer"]
    for arguments, status, words in (
        (["--help"], 0, "compare-inits"),
        (["--version"], 0, "matt-fast 0"),
        (["transfer", "--help"], 0, "While it runs"),
        (["transfer", *PATHS, "--objective=nonsense"], 1, "objective: wanted"),
        (["transfer", *PATHS, "--data=text.jsonl"], 1, "data: wanted"),
        (["transfer", "--model=x"], 2, "Missing option"),
        (["prepare", *PATHS, "--executor=x"], 1, "executor: wanted one of local, slurm, ray, got 'x'"),
        (["prepare", *PATHS, "--executor-option=x"], 1, "executor_option: wanted NAME=VALUE"),
        (["plan", *model, "--objective=x"], 1, "objective: wanted"),
        (["plan", *model, "--device=tpu"], 1, "device: wanted one of cuda, cpu, got 'tpu'"),
        (["plan", *model, "--batch=0"], 1, "batch: wanted at least 1"),
        (["compare-inits", *model, "--eval-data=x.txt", "--init=mean"], 1, "eval_data: wanted"),
        (["evaluate", "--model=x", "--data=x.txt"], 1, "data: wanted"),
        (["evaluate", "--model=x", "--data=x", "--limit=0"], 1, "limit: wanted at least 1"),
        (["tokenizer", "report", "org/model"], 1, "data: wanted text to tokenise"),
        (["show", "segments", "--old=a/b", "--new=c/d", "--text= "], 1, "text: wanted text"),
        (["show", "influence", "--text=x", "--head=x"], 1, "head: wanted a number"),
        (["show", "tokens", "x", "--sort=x"], 1, "sort: wanted one of"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


def test_what_can_be_known_torch_free_is_what_the_rest_knows():
    assert set(TEXT_FILES) == set(FORMATS)
    assert by_value.MANIFEST == shards.MANIFEST


def test_every_argument_of_a_transfer_has_an_option(called):
    assert run("transfer", *PATHS).exit_code == 0
    (given,) = called
    known = set(inspect.signature(matt_fast.recipe.transfer.transfer).parameters)
    assert known - given.keys() == {"n_layers"}  # None, a third of the depth
    assert given["training"] == TrainingOptions()
    defaults = inspect.signature(matt_fast.recipe.transfer.transfer).parameters
    for name in ("init", "max_length", "batch_size", "eval_pieces", "precision", "seed", "freeze_shared"):
        assert given[name] == defaults[name].default


def test_options_reach_the_transfer(called):
    options = ["--layer=3", "--epochs=1.5", "--checkpoint-every=500", "--validate-every=30s", "--eval-data=org/text"]
    more = ["--patience=3", "--track=tensorboard,wandb", "--device=cuda:1", "--max-grad-norm=0", "--packing"]
    assert run("transfer", *PATHS, *options, *more).exit_code == 0
    (given,) = called
    assert (given["n_layers"], given["epochs"], given["checkpoint_every"], given["validate_every"]) == (
        3,
        1.5,
        "500",
        "30s",
    )
    assert (given["patience"], given["track"], given["device"]) == (3, "tensorboard,wandb", "cuda:1")
    assert given["training"] == TrainingOptions(max_grad_norm=None, packing=True)
    assert given["resume"] is False


def test_a_file_gives_options_and_the_command_line_wins(called, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: org/model\ntokenizer: 'org/tokenizer'\ndata: org/data\noutput: 2024-01-01\nlr: 3e-4\nsteps: 20\n"
        "n-layers: 2\ncheckpoint_every: 50\nfreeze-shared: false\nprecision: no\ncompile: true\ndonor: null\n"
    )
    assert run("transfer", f"--config={file}", "--steps=30", "--model=org/other").exit_code == 0
    (given,) = called
    assert (given["model"], given["tokenizer"], given["output"]) == ("org/other", "org/tokenizer", Path("2024-01-01"))
    assert (given["n_layers"], given["checkpoint_every"], given["freeze_shared"]) == (2, "50", False)
    assert (given["precision"], given["donor"]) == ("no", None)
    assert given["training"] == TrainingOptions(lr=3e-4, steps=30, compile=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", "run.yaml: stepz: wanted an option of the command, got an unknown one; did you mean steps?"),
        ("config: x", "run.yaml: config: wanted an option of the command"),
        ("steps: 3\nsteps: 4", "run.yaml: steps: wanted each option once"),
        ("layer: 3\nn-layers: 4", "run.yaml: n-layers: wanted each option once"),
        ("steps: many", "run.yaml: steps: wanted int, got 'many' (str)"),
        ("steps: 1.5", "run.yaml: steps: wanted int, got 1.5 (float)"),
        ("steps: true", "run.yaml: steps: wanted int, got True (bool)"),
        ("packing: 'yes'", "run.yaml: packing: wanted bool, got 'yes' (str)"),
        ("model: 3", "run.yaml: model: wanted str, got 3 (int)"),
        ("init: null", "run.yaml: init: wanted str, got None"),
        ("- steps", "run.yaml: wanted lines like 'steps: 1000', got sequence"),
        ("a: [", "run.yaml: wanted YAML, but it cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(called, tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    refused = run("transfer", *PATHS, "--config=run.yaml")
    assert refused.exit_code == 1
    assert words in message(refused)


def test_a_run_is_resumed_with_its_own_options(called, tmp_path):
    folder = tmp_path / "moved"
    (folder / "run").mkdir(parents=True)
    config = {"model": "org/model", "tokenizer": "org/tok", "data": "org/data", "output": "/elsewhere", "steps": 70}
    (folder / "run" / "run.yaml").write_text(dump_config(config))
    (folder / "run" / "run.json").write_text("{}")
    assert run("transfer", f"--resume={folder}").exit_code == 0
    assert run("transfer", "--data=org/other", f"--resume={folder}", f"--output={folder}/../moved").exit_code == 0
    first, second = called
    assert (first["resume"], first["model"], first["output"]) == (True, "org/model", folder)
    assert first["training"].steps == 70
    assert second["data"] == "org/other"
    refused = run("transfer", f"--resume={folder}", "--output=other")
    assert "output: wanted" in message(refused)


def test_the_resolved_configuration_gives_the_same_arguments(called, tmp_path):
    (tmp_path / "1e3").mkdir()  # a name that looks like a number
    paths = ["--model=1e3", "--tokenizer=no", "--data=org/data", "--output=-x"]
    options = [
        "--layer=2",
        "--objective=aim",
        "--metric=cosine",
        "--lr=1e-05",
        "--max-grad-norm=0",
        "--no-freeze-shared",
        "--map=<new>=old: 1",
        "--map=[x]==",
    ]
    assert (
        run("transfer", *paths, *options, "--checkpoint-every=7", "--text-field=10:30", "--split=2024-01-01").exit_code
        == 0
    )
    text = dump_config(resolved_config(called[0]))
    read = yaml.safe_load(text)  # by the rules of YAML 1.1: words stay words
    assert (read["tokenizer"], read["text_field"], read["split"]) == ("no", "10:30", "2024-01-01")
    assert read["model"] == str(tmp_path / "1e3")
    assert read["map_tokens"] == ["<new>=old: 1", "[x]=="]
    (tmp_path / "run.yaml").write_text(text)
    assert run("transfer", "--config=run.yaml").exit_code == 0
    first, second = ({name: x for name, x in call.items() if not name.startswith("on_")} for call in called)
    assert second == first | {"model": str(tmp_path / "1e3"), "output": tmp_path / "-x"}


def test_objects_of_python_are_named_in_the_configuration():
    arguments = {"tokenizer": new_tokenizer(), "init": test_objects_of_python_are_named_in_the_configuration}
    found = resolved_config(
        arguments | {"n_layers": None, "training": TrainingOptions(max_grad_norm=None), "on_step": print}
    )
    assert found["init"] == "<function>"
    assert found["tokenizer"].startswith("<")
    assert found["layer"] == "third"
    assert found["max_grad_norm"] == 0
    assert found.keys() == {"tokenizer", "init", "layer", *(field.name for field in fields(TrainingOptions))}


@pytest.mark.parametrize(
    "value", ["", "1e3", "null", "~", "true", "no", "0x1F", "1_000", "a: b", "# a", "ü\n", "1.", ".5"]
)
def test_words_stay_words_in_a_file(tmp_path, value):
    (tmp_path / "x.yaml").write_text(dump_config({"word": value}), encoding="utf-8")
    assert load_config(tmp_path / "x.yaml", {"word": str}) == {"word": value}


def test_json_is_all_that_stdout_has(called):
    done = run("transfer", *PATHS, "--json")
    found = json.loads(done.stdout)
    assert found["output"] == "new-folder"
    assert found["evaluations"]["trained"]["bits_per_byte"] == 2.5
    assert (found["progress"]["step"], found["progress"]["loss"]) == (3, 0.5)
    assert "losses" not in found["progress"]  # as many as steps
    assert "\ntraining\n" in done.stderr
    assert "bits per byte" in done.stderr


def test_quiet_prints_nothing_but_errors(called):
    done = run("transfer", *PATHS, "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    done = run("transfer", *PATHS, "--quiet", "--json")
    assert json.loads(done.output)["n_layers"] == 2
    assert "lr: wanted" in run("transfer", *PATHS, "--quiet", "--lr=0").stderr
    assert "TQDM_DISABLE" not in os.environ


def test_of_several_processes_the_first_prints(called, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("transfer", *PATHS, "--json").output == ""


def test_plain_values_are_valid_json():
    found = plain({"a": float("nan"), "b": Path("x"), "c": {3, 1}, 4: (TrainingOptions(), None)})
    assert found == {"a": None, "b": "x", "c": [1, 3], "4": [asdict(TrainingOptions()), None]}


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (KeyboardInterrupt("go on with --resume x"), 130, "go on with --resume x\n"),
        (KeyboardInterrupt(), 130, ""),
        (with_note(ValueError("no"), "go on with [x]"), 1, "Error: no\ngo on with [x]\n"),
        (SystemExit(143), 143, ""),
        (ValueError("wanted [red]b[/x]y :smile:"), 1, "Error: wanted [red]b[/x]y :smile:\n"),
        (
            OSError("got 'a\x1b[31m\udcffb\u202e'" + " long" * 40),
            1,
            f"Error: got 'a\\x1b[31m\\udcffb\\u202e'{' long' * 40}\n",
        ),
        (KeyError("model.a"), 1, f"Error: KeyError: 'model.a'\n{WHERE}"),
        (StopIteration(), 1, f"Error: StopIteration\n{WHERE}"),
        (NotImplementedError("of [b]"), 1, f"Error: NotImplementedError: of [b]\n{WHERE}"),
        (with_note(IndexError("out of range"), "go on"), 1, f"Error: IndexError: out of range\ngo on\n{WHERE}"),
        (SafetensorError("too short"), 1, f"Error: SafetensorError: too short\n{WHERE}"),
        (
            TypeError("'NoneType' object is not iterable"),
            1,
            f"Error: TypeError: 'NoneType' object is not iterable\n{WHERE}",
        ),
        (BAD_BYTE, 1, f"Error: UnicodeDecodeError: {BAD_BYTE}\n{WHERE}"),
        (MemoryError(), 1, f"Error: MemoryError\n{WHERE}"),
    ],
    ids=repr,
)
def test_how_a_command_ends(called, monkeypatch, raised, status, words):
    def transfer(**arguments):
        raise raised

    monkeypatch.setattr(matt_fast.recipe.transfer, "transfer", transfer)
    ended = run("transfer", *PATHS, "--quiet")
    assert (ended.exit_code, ended.stderr) == (status, words)
    ended = run("transfer", *PATHS, "--quiet", "--debug")
    assert ended.exit_code == status
    assert ended.stderr.endswith(words.removesuffix(WHERE))
    is_error = isinstance(raised, Exception)
    assert ("Traceback" in ended.stderr and "in transfer\n    raise raised" in ended.stderr) == is_error


REQUIRED = {
    "transfer": PATHS,
    "prepare": PATHS,
    "evaluate": PATHS[::2],
    "plan": PATHS[:2],
    "compare-inits": [*PATHS[:2], "--eval-data=org/other", "--init=mean"],
}


def stub_all(monkeypatch, error):
    """Let what each command calls raise an error at once."""

    def broken(*arguments, **options):
        raise error

    patched = (  # all are imported before the first is
        (importlib.import_module("matt_fast.recipe.transfer"), "transfer"),
        (importlib.import_module("matt_fast.recipe.preparing"), "prepare"),
        (importlib.import_module("matt_fast.recipe.comparison"), "compare_initializers"),
        (importlib.import_module("matt_fast.planning.plan"), "plan"),
        (importlib.import_module("matt_fast.recipe.evaluating"), "evaluate_models"),
    )
    for module, name in patched:
        monkeypatch.setattr(module, name, broken)


@pytest.mark.parametrize("command", REQUIRED)
def test_no_command_ends_with_a_traceback(monkeypatch, command):
    stub_all(monkeypatch, AttributeError("'NoneType' object has no attribute 'x'"))
    ended = run(command, *REQUIRED[command])
    wanted = f"Error: AttributeError: 'NoneType' object has no attribute 'x'\n{WHERE}"
    assert (ended.exit_code, ended.stderr) == (1, wanted)


def test_a_result_that_is_worse_than_its_start_is_no_success(called, monkeypatch):
    monkeypatch.setattr(TransferResult, "worse_than_start", "loss 9 after 1", raising=False)
    ended = run("transfer", *PATHS, "--json", "--quiet")
    assert (ended.exit_code, ended.stderr) == (1, "The result is worse than its start: loss 9 after 1\n")
    assert json.loads(ended.stdout)["worse_than_start"] == "loss 9 after 1"


@pytest.mark.parametrize(
    ("losses", "worse"),
    [
        ([0.0, 0.9, 0.8], None),  # the first batch had nothing to predict
        ([0.4, 0.0, 0.9], "loss 0.9 at the end of training, 0.4 at its start"),
        ([0.0, 0.0], None),
        ([], None),
    ],
)
def test_steps_with_nothing_to_predict_are_no_start(losses, worse):
    result = replace(a_result("x"), evaluations={}, progress=Progress(losses=losses))
    assert result.worse_than_start == worse


def test_paths_are_printed_as_they_are(called):
    done = run("transfer", *PATHS[:3], "--output=a[/b]y :smile: [bold]")
    assert "Written: a[/b]y :smile: [bold]\n" in done.stdout


EVIL = "a\x1b[2J\x1b]0;x\x07b\x9bc\u202ed\u2028e\rf\udcffg"
SHOWN = r"a\x1b[2J\x1b]0;x\x07b\x9bc\u202ed\u2028e\rf\udcffg"


def test_control_characters_are_printed_as_escapes():
    assert printable(EVIL) == SHOWN
    for harmless in ("", "two\nlines\tand a tab", "日本語 café עברית 👩‍👩‍👧", "x" * 99):
        assert printable(harmless) == harmless


def test_names_cannot_reach_the_terminal_with_escape_codes(called, monkeypatch):
    done = run("transfer", *PATHS[:3], f"--output={EVIL}")
    assert f"Written: {SHOWN}\n" in done.stdout
    done = run("transfer", *PATHS[:3], f"--output={EVIL}", "--json")
    assert json.loads(done.stdout)["output"] == EVIL
    assert done.stdout.isascii()

    def transfer(**arguments):
        arguments["on_stage"](f"stage {EVIL}")
        arguments["on_message"](f"message {EVIL}")
        raise OSError(f"no such file: {EVIL}")

    monkeypatch.setattr(matt_fast.recipe.transfer, "transfer", transfer)
    ended = run("transfer", *PATHS)
    assert ended.exit_code == 1
    assert "\x1b" not in ended.stdout + ended.stderr
    assert f"stage {SHOWN}\nmessage {SHOWN}\n" in ended.stdout
    assert f"no such file: {SHOWN}" in ended.stderr.replace("\n", "")


def test_what_libraries_say_cannot_reach_the_terminal_with_escape_codes():
    before = warnings.formatwarning, logging.getLogRecordFactory()
    with command_output(as_json=False, quiet=False):
        text = warnings.formatwarning(UserWarning(EVIL), UserWarning, "file.py", 1, "line")
        record = logging.getLogger("library").makeRecord(
            "library", logging.WARNING, "file.py", 1, "of %s", (EVIL,), None
        )
    assert f"UserWarning: {SHOWN}\n" in text
    assert record.getMessage() == f"of {SHOWN}"
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    save_tiny_model(path / "teacher")
    new_tokenizer().save_pretrained(path / "tokenizer")
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_comparisons_are_shown_and_kept_as_they_come(folder, tmp_path, monkeypatch):
    from matt_fast.recipe import comparison

    kept = tmp_path / "found [x].json"
    seen = []
    initial_rows = comparison.initial_rows

    def spy(teacher, vocabulary, init, *arguments, **options):
        seen.append(len(json.loads(kept.read_text())["results"]) if kept.exists() else 0)
        if init == "zero":
            raise ValueError("zero is not wanted")
        return initial_rows(teacher, vocabulary, init, *arguments, **options)

    monkeypatch.setattr(comparison, "initial_rows", spy)
    paths = [
        f"--model={folder / 'teacher'}",
        f"--tokenizer={folder / 'tokenizer'}",
        f"--eval-data={folder / 'text.jsonl'}",
    ]
    inits = ["--init=mean", "--init=random", "--init=zero"]
    stopped = run("compare-inits", *paths, *inits, f"--output={kept}", "--device=cpu")
    assert stopped.exit_code == 1
    assert seen == [0, 1, 2]
    results = json.loads(kept.read_text())["results"]
    for result in results:
        assert any(
            line.split()[:2] == [result["init"], f"{result['bits_per_byte']:.4f}"]
            for line in stopped.stdout.splitlines()
        )
    done = run("compare-inits", *paths, *inits[:2], "--json")
    found = json.loads(done.stdout)
    assert [result["init"] for result in found["results"]] == ["mean", "random"]
    assert found["results"][0]["bits_per_byte"] == results[0]["bits_per_byte"]
    assert found["original"] == json.loads(kept.read_text())["original"] > 0


def test_evaluate_and_plan_as_json(folder):
    scored = run(
        "evaluate", f"--model={folder / 'teacher'}", f"--data={folder / 'text.jsonl'}", "--json", "--device=cpu"
    )
    found = json.loads(scored.stdout)["texts"]["text"]["teacher"]
    assert found["interval"]["low"] <= found["evaluation"]["bits_per_byte"] <= found["interval"]["high"]
    assert f"{found['evaluation']['bits_per_byte']:.4f}" in scored.stderr
    planned = run(
        "plan", f"--model={folder / 'teacher'}", f"--tokenizer={folder / 'tokenizer'}", "--device=cpu", "--json"
    )
    found = json.loads(planned.stdout)
    assert found["rows"] >= found["trainable"] > 0
    assert sum(found["step"]["parts"].values()) > 0


def test_held_out_texts_by_name(tmp_path):
    (tmp_path / "a=b.txt").write_text("text")
    assert held_out_texts(None) is None
    assert held_out_texts([f"{tmp_path}/a=b.txt"]) == f"{tmp_path}/a=b.txt"  # a file that is there
    assert held_out_texts(["code=x.txt"]) == {"code": "x.txt"}
    assert held_out_texts(["code=x.txt", "prose=y=z.txt"]) == {"code": "x.txt", "prose": "y=z.txt"}
    for wrong in (["x.txt", "y.txt"], ["code=x.txt", "y.txt"], ["code=x.txt", "code=y.txt"]):
        with pytest.raises(ValueError, match="eval_data: wanted NAME=TEXT with another name for each text"):
            held_out_texts(wrong)


def test_a_recipe_gives_options_under_those_that_are_typed_or_in_a_file(called, tmp_path):
    (tmp_path / "options.yaml").write_text("batch-size: 3\n")
    ended = run("transfer", *PATHS, "--recipe=paper", "--lr=0.5", f"--config={tmp_path / 'options.yaml'}")
    assert ended.exit_code == 0, ended.stderr
    assert "recipe paper: --init focus --objective aim" in ended.stdout
    options, given = called[-1]["training"], called[-1]
    assert (options.objective, options.lr, options.decay_steps) == ("aim", 0.5, 0)
    assert (given["init"], given["max_length"], given["batch_size"], given["healing"]) == ("focus", 256, 3, None)
    run("transfer", *PATHS, "--recipe=quick")
    assert (called[-1]["healing"].objective, called[-1]["training"].steps) == ("segment-kl", 0)
    assert "recipe: wanted one of quick, paper, best" in message(run("transfer", *PATHS, "--recipe=fast"))
