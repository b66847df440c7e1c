"""What a person sees while a command works: on a terminal, and in a log."""

import io
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from matt_fast.cli import progress
from matt_fast.cli.progress import ProgressDisplay, duration


def step(number, **values):
    usual = {"loss": 0.123456, "parts": {"aim": 0.123456}, "tokens": 1000 * number, "seconds": 0.5 * number}
    return SimpleNamespace(step=number, **(usual | values))


def until(happened):
    """Wait for another thread."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def log():
    return Console(file=io.StringIO(), width=40)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None, _environ={"TERM": "xterm"})


@pytest.fixture
def impatient(monkeypatch):
    for name in ("SECONDS_TO_FIRST_LINE", "SECONDS_TO_NEXT_LINE", "SECONDS_WITHOUT_BAR"):
        monkeypatch.setattr(progress, name, 0.05)


def test_a_log_has_stages_and_lines(log, impatient):
    written = log.file.getvalue
    with ProgressDisplay(log, 2000) as display:
        display.on_stage("vocabulary")
        until(lambda: "vocabulary: 0:00 so far\n" in written())
        display.on_stage("initialisation")
        display.on_progress("rows", 1200, 50_000)
        until(lambda: "initialisation: 1,200 of 50,000 rows, 0:00 so far\n" in written())
        display.on_progress("bytes", 1_500_000, None)
        until(lambda: "initialisation: 1.5 MB, 0:00 so far\n" in written())
        display.on_stage("training")
        display.on_step(step(10))
        display.on_step(step(20, parts={"aim": 0.1, "ntp": 2.0}))
        until(lambda: "\ntraining: step 20 of 2,000" in written())
        display.on_message("[a] message :smile:")
    lines = written().splitlines()
    for stage in ("vocabulary", "initialisation", "training", "[a] message :smile:"):
        assert stage in lines
    line = next(line for line in lines if "step 20" in line)
    assert "loss 0.1235 (aim 0.1, ntp 2), 2,000 tokens/s, " in line
    assert "GiB in use, 0:00 so far, 0:0" in line
    assert line.endswith(" left")
    assert "\x1b" not in written()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress lines"]


def test_a_log_is_left_alone_for_a_while(log):
    with ProgressDisplay(log, 10) as display:
        display.on_stage("training")
        display.on_step(step(1))
        assert log.file.getvalue() == "training\n"
    last = log.file.getvalue().splitlines()[1]
    assert last.startswith("training: step 1 of 10, loss 0.1235, 2,000 tokens/s")  # what it came to


def test_the_thread_ends_with_an_error(log):
    with pytest.raises(RuntimeError), ProgressDisplay(log, 10):
        raise RuntimeError
    assert not [thread for thread in threading.enumerate() if thread.name == "progress lines"]


@pytest.mark.parametrize("terminal_or_not", [True, False])
def test_a_quiet_console_prints_nothing_and_has_no_thread(terminal_or_not):
    console = Console(file=io.StringIO(), force_terminal=terminal_or_not, quiet=True)
    before = threading.active_count()
    with ProgressDisplay(console, 3) as display:
        assert threading.active_count() == before
        display.on_stage("training")
        display.on_step(step(1))
    assert console.file.getvalue() == ""


def test_a_terminal_has_a_bar_for_a_slow_stage(terminal, impatient):
    written = terminal.file.getvalue
    with ProgressDisplay(terminal, 2000) as display:
        display.on_stage("evaluation (original)")
        until(lambda: "0:00 so far" in written())  # moving, of unknown length
        display.on_progress("pieces", 3, 40)
        until(lambda: "3 of 40 pieces" in written())
        display.on_stage("training")
        display.on_step(step(10))
        time.sleep(0.02)
        display.on_step(step(20))
        until(lambda: "step 20 of 2,000" in written())
        assert "0:00 so far, 0:0" in written().split("step 20 of 2,000")[-1]
        assert " left" in written()
        assert "loss 0.1235, 2,000 tokens/s" in written()
        display.on_progress("pieces", 1, 20)  # validation in between
        until(lambda: "1 of 20 pieces" in written())
        display.on_progress("pieces", 20, 20)
        display.on_step(step(21))
        until(lambda: "step 21 of 2,000" in written())
        display.on_progress("pieces", 1, 20)  # and once more
        until(lambda: written().count("1 of 20 pieces") > 1)
    assert "evaluation (original)\n" in written().replace("\r", "")
    assert written()[-40:].count("\x1b[1A\x1b[2K") == 2  # the bar and the figures are gone


def test_a_short_stage_has_no_bar(terminal):
    with ProgressDisplay(terminal, 10) as display:
        display.on_stage("vocabulary")
        display.on_progress("rows", 1, 2)
        display.bar.refresh()
    assert "rows" not in terminal.file.getvalue()


def test_the_number_of_steps_may_come_later(log):
    display = ProgressDisplay(log)
    display.on_step(step(1))
    assert display.line().startswith("training: step 1, loss 0.1235")
    display.on_progress("steps", 1, 30)
    display.on_step(step(2))
    assert display.line().startswith("training: step 2 of 30, ")


def test_time_left_is_that_of_the_steps_of_this_process(log, monkeypatch):
    """A run that is gone on with begins in the middle."""
    display = ProgressDisplay(log, 1000)
    now = [100.0]
    monkeypatch.setattr(display.bar, "get_time", lambda: now[0])
    display.on_stage("training")
    for number in (900, 910, 920):
        now[0] += 5
        display.on_step(step(number))
    assert display.line().endswith("0:40 left")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_prints_without_the_bar(terminal, capfd):
    with ProgressDisplay(terminal, 10), terminal._lock:  # as the bar's thread may at the moment of a fork
        child = os.fork()
        if child == 0:
            print("from the child", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert "from the child" not in terminal.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01"), (90000, "25:00:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_time_left_counts_validations_and_a_line_in_one_says_the_step(log, monkeypatch):
    display = ProgressDisplay(log, 100)
    now = [0.0]
    monkeypatch.setattr(display.bar, "get_time", lambda: now[0])
    display.on_stage("training")
    display.on_progress("steps", 40, 100)
    for number in (50, 60):  # 10 s for ten steps, and then 20 s for a validation
        now[0] += 10
        display.on_step(step(number))
        display.on_progress("pieces", 1, 4)
        assert re.match(rf"training: step {number} of 100, loss .* in use, 1 of 4 pieces, ", display.line())
        now[0] += 20
        display.on_progress("pieces", 4, 4)
        display.on_progress("steps", number, 100)
    assert "pieces" not in display.line()
    assert display.line().endswith("2:00 left")
