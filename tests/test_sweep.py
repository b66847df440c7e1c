"""Depths of the target layer, measured one after the other."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import run
from matplotlib.figure import Figure
from small_jobs import held_out

from matt_fast import TrainingOptions, sweep_layers, transfer
from matt_fast.recipe import sweep


def test_a_sweep_measures_each_depth_as_a_transfer_of_its_own(job, monkeypatch):
    arguments, _ = job
    alive = []  # a process that is killed leaves its semaphores behind
    monkeypatch.setattr("subprocess.Popen.kill", lambda process: alive.append(process.poll() is None))
    arguments |= {"eval_data": held_out(arguments), "training": TrainingOptions(steps=3, lr=1e-2)}
    seen = []
    outcome = sweep_layers(**arguments, depths=[1, 3], on_step=lambda progress: seen.append(progress.step))
    assert seen == [1, 2, 3] * 2
    assert alive == [False] * 3
    output = arguments.pop("output")
    assert sorted(path.name for path in output.iterdir()) == ["depths.json", "depths.png"]
    written = json.loads((output / "depths.json").read_text())
    assert [depth["n_layers"] for depth in written["depths"]] == [1, 3]
    for depth in outcome.depths:
        alone = transfer(**arguments, output=output.with_name(f"layer-{depth.n_layers}"), n_layers=depth.n_layers)
        assert depth.bits_per_byte == pytest.approx(alone.evaluations["trained"].bits_per_byte, rel=1e-6)
        assert outcome.initialised == pytest.approx(alone.evaluations["initialised"].bits_per_byte, rel=1e-6)
        assert depth.memory > 0
    with pytest.raises(ValueError, match="depths: wanted layers from 1 to 3 for this model, got 4"):
        sweep_layers(**arguments, output=output.with_name("other"), depths=[4])
    with pytest.raises(ValueError, match=r"max_length: wanted room for text"):  # from the other process, as it is
        sweep_layers(**arguments | {"max_length": 1}, output=output.with_name("other"), depths=[1])
    assert not output.with_name("other").exists()


def measured_without_work(calls, fails_at=None):
    """In place of `transfer_apart`: figures that follow from the depth."""

    def measured(arguments, callbacks):
        calls.append(arguments["n_layers"])
        if arguments["n_layers"] == fails_at:
            raise FloatingPointError("not finite")
        evaluations = {name: SimpleNamespace(bits_per_byte=1.5) for name in ("original", "initialised", "trained")}
        return SimpleNamespace(
            evaluations=evaluations,
            progress=SimpleNamespace(seconds=100.0 + arguments["n_layers"] / 1000),
            training_memory=1 << 30,
        )

    return measured


def test_a_sweep_keeps_what_it_measured_and_draws_all_of_it(job, monkeypatch):
    arguments, _ = job
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work([], fails_at=3))
    figures = []

    def figure(**options):
        figures.append(Figure(**options))
        return figures[-1]

    monkeypatch.setattr(sweep, "figure_class", lambda: figure)
    with pytest.raises(FloatingPointError):
        sweep_layers(**arguments, eval_data=held_out(arguments), depths=[1, 2, 3])
    written = json.loads((arguments["output"] / "depths.json").read_text())
    assert [depth["n_layers"] for depth in written["depths"]] == [1, 2]
    assert sorted(path.name for path in arguments["output"].iterdir()) == ["depths.json", "depths.png"]
    for axis in figures[-1].axes[1:]:
        highest = max(axis.lines[0].get_ydata())
        assert axis.get_ylim()[0] == 0
        assert axis.get_ylim()[1] > 1.05 * highest  # the marker is not cut


def test_a_second_sweep_measures_only_what_is_missing(job, monkeypatch):
    arguments, _ = job
    arguments |= {"eval_data": held_out(arguments), "init": rows_of_ones}
    calls, told = [], []
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work(calls, fails_at=3))
    with pytest.raises(FloatingPointError):
        sweep_layers(**arguments, depths=[2, 3])
    monkeypatch.setattr(sweep, "transfer_apart", measured_without_work(calls))
    (arguments["output"] / ".part-model" / "run").mkdir(parents=True)  # as one that was killed leaves it
    outcome = sweep_layers(**arguments, depths=[3, 1, 2], on_depth=lambda depth: told.append(depth.n_layers))
    assert calls == [2, 2, 3, 3, 1]  # the first is the start before training
    assert told == [3, 1, 2]
    assert [depth.n_layers for depth in outcome.depths] == [1, 2, 3]
    assert sorted(path.name for path in arguments["output"].iterdir()) == ["depths.json", "depths.png"]
    other = arguments | {"training": TrainingOptions(steps=5, lr=1e-2), "seed": 3}
    with pytest.raises(ValueError, match=r"other settings: seed 0 there, 3 here; training.steps 4 there, 5 here$"):
        sweep_layers(**other)
    with pytest.raises(ValueError, match=r"other settings: init 'test_sweep.rows_of_ones' there, 'mean' here$"):
        sweep_layers(**arguments | {"init": "mean"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'iint'"):
        sweep_layers(**arguments, iint="mean")
    assert len(calls) == 5


def rows_of_ones(embeddings, rows, matches, subtokens):
    return torch.ones(rows, embeddings.shape[1])


def test_the_command_line_sweeps_and_names_what_is_missing(job, monkeypatch):
    arguments, _ = job
    monkeypatch.setattr(sweep, "transfer_apart", lambda arguments, callbacks: transfer(**arguments, **callbacks))
    paths = [f"--{name}={arguments[name]}" for name in ("model", "tokenizer", "data", "output")]
    without = run("transfer", *paths, "--layer=sweep")
    assert "eval_data: wanted held-out text to compare depths on, got none" in " ".join(without.output.split())
    wrong = run("transfer", *paths, "--layer=half")
    assert "layer: wanted a number, 'third' or 'sweep', got 'half'" in " ".join(wrong.output.split())
    done = run(
        "transfer", *paths, "--layer=sweep", "--steps=1", "--max-length=48", f"--eval-data={held_out(arguments)}"
    )
    assert done.exit_code == 0, done.output
    assert "before training" in done.output
    assert (arguments["output"] / "depths.png").exists()
