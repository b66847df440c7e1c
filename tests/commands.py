"""The command line in this process, with what it prints; and commands that do nothing."""

import importlib
import inspect
from pathlib import Path

from typer.testing import CliRunner

import matt_fast.recipe.transfer
from matt_fast import TransferResult
from matt_fast.cli import app
from matt_fast.evaluation.bits_per_byte import Evaluation
from matt_fast.initializers import InitReport
from matt_fast.training.state import Progress

PATHS = ["--model=org/model", "--tokenizer=org/tokenizer", "--data=org/data", "--output=new-folder"]


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def message(result):
    """What was printed, without the frame and the line breaks of a terminal."""
    return " ".join(result.output.replace("│", " ").split())


WHERE = "--debug shows where it happened.\n"


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


def without_work(monkeypatch):
    """Put a function that does nothing in place of `transfer`; returns the list of its calls' arguments."""
    calls = []

    def transfer(**arguments):
        calls.append(arguments)
        arguments["on_stage"]("training")
        return a_result(arguments["output"])

    transfer.__signature__ = inspect.signature(matt_fast.recipe.transfer.transfer)
    monkeypatch.setattr(matt_fast.recipe.transfer, "transfer", transfer)
    return calls
