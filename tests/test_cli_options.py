"""Options of the command line and of files, and the arguments that they become."""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from commands import PATHS, message, run
from tiny import new_tokenizer

import matt_fast.recipe.transfer
from matt_fast import HealingOptions, TrainingOptions
from matt_fast.recipe.config import dump_config, load_config, resolved_config


def test_every_argument_of_a_transfer_has_an_option(called):
    assert run("transfer", *PATHS).exit_code == 0
    (given,) = called
    known = set(inspect.signature(matt_fast.recipe.transfer.transfer).parameters)
    assert known - given.keys() == {"n_layers"}  # None, a third of the depth
    parameters = inspect.signature(matt_fast.recipe.transfer.transfer).parameters
    defaults = {name: x.default for name, x in parameters.items()} | {"training": TrainingOptions()}
    for name in given.keys() - {"model", "tokenizer", "data", "output"}:
        if not name.startswith("on_"):
            value = tuple(given[name]) if isinstance(given[name], list) else given[name]
            assert value == defaults[name], name


def test_options_of_healing_are_those_of_the_argument(called):
    assert run("transfer", *PATHS, "--heal=lora").exit_code == 0
    assert called[0]["healing"] == HealingOptions()


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
    (tmp_path / "1e3" / "config.json").write_text("{}")
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


def test_a_recipe_gives_options_under_those_that_are_typed_or_in_a_file(called, tmp_path):
    (tmp_path / "options.yaml").write_text("batch-size: 3\n")
    ended = run("transfer", *PATHS, "--recipe=paper", "--lr=0.5", f"--config={tmp_path / 'options.yaml'}")
    assert ended.exit_code == 0, ended.stderr
    shown = "recipe paper: --init focus --objective aim --layer third --lr 0.5 --decay-steps 0 --max-length 256"
    assert f"{shown} --batch-size 3" in " ".join(ended.stdout.split())
    options, given = called[-1]["training"], called[-1]
    assert (options.objective, options.lr, options.decay_steps) == ("aim", 0.5, 0)
    assert (given["init"], given["max_length"], given["batch_size"], given["healing"]) == ("focus", 256, 3, None)
    run("transfer", *PATHS, "--recipe=quick")
    assert (called[-1]["healing"].objective, called[-1]["training"].steps) == ("ntp", 0)
    assert called[-1]["rehearse"] == 64
    run("transfer", *PATHS, "--recipe=quick", "--rehearse=0")
    assert called[-1]["rehearse"] == 0
    assert called[-1]["init"] == "composed"
    again = ["--model=org/done", "--tokenizer=org/done", *PATHS[2:], "--recipe=quick", "--teacher=org/model"]
    for more, init in (((), "mean"), (("--init=mean",), "mean"), (("--init=composed",), "composed")):
        ended = run("transfer", *again, *more)
        assert f"recipe quick: --init {init} " in ended.stdout
        assert called[-1]["init"] == init
    assert "recipe: wanted one of quick, paper, best" in message(run("transfer", *PATHS, "--recipe=fast"))
