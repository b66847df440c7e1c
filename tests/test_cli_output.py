"""What the command line prints, and how it ends."""

import io
import json
import logging
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from commands import PATHS, REQUIRED, WHERE, a_result, run, stub_all
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from tiny import TEXTS, jsonl, new_tokenizer, save_tiny_model

import matt_fast.recipe.transfer
from matt_fast import TrainingOptions, TransferResult
from matt_fast.cli.output import PACKAGE, command_output, plain
from matt_fast.cli.tables import print_table
from matt_fast.support.printable import printable
from matt_fast.training.state import Progress

BAD_BYTE = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid start byte")


def with_note(error, note):
    error.add_note(note)
    return error


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


def test_a_result_that_gives_nan_is_worse():
    first = next(iter(a_result("x").evaluations.values()))
    stages = {"initialised": first, "trained": replace(first, bits_per_byte=float("nan"))}
    assert replace(a_result("x"), evaluations=stages).worse_than_start.startswith("bits per byte nan after training")


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
        ours = warnings.formatwarning(UserWarning(EVIL), UserWarning, str(PACKAGE / "data" / "rows.py"), 1)
        record = logging.getLogger("library").makeRecord(
            "library", logging.WARNING, "file.py", 1, "of %s", (EVIL,), None
        )
    assert f"UserWarning: {SHOWN}\n" in text
    assert ours == f"Warning: {SHOWN}\n"
    assert record.getMessage() == f"of {SHOWN}"
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before


@pytest.mark.parametrize("width", [24, 31, 40, 80])
def test_tables_are_never_cut(width):
    """Every cell is there, whole and with its column's name, in a table or in lines below the row's name."""
    console = Console(width=width, record=True, file=io.StringIO())
    table = Table(title="of a text")
    table.add_column("")
    for name in ("bits per byte", "times"):
        table.add_column(name, no_wrap=True)
    table.add_row(Text("[b]日本語"), "1.6523 (1.6 to 1.7)", "")
    table.add_row("adapted", "1.6734 (1.6 to 1.8)", "1.013")
    print_table(console, table)
    text = console.export_text()
    assert ("┃" in text) == (width >= 50)
    for part in ("of a text", "[b]日本語", "1.6523 (1.6 to 1.7)", "adapted", "1.6734 (1.6 to 1.8)", "1.013", "times"):
        assert part in " ".join(text.split())
    assert max(map(cell_len, text.splitlines())) <= width


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    save_tiny_model(path / "teacher")
    new_tokenizer().save_pretrained(path / "tokenizer")
    (path / "text.jsonl").write_text(jsonl(TEXTS))
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
