"""Curves of a run, from its metrics.jsonl."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from matt_fast.report.curves import BINS, curves_figure, draw_curves, read_curves
from matt_fast.support.installing import install_line


def write(path: Path, losses, validations=(), parts=("aim",)) -> Path:
    with path.open("w") as file:
        for step, loss in enumerate(losses, 1):
            values = {"step": step, "loss": loss, **{name: loss / len(parts) for name in parts}, "lr": step / 1000}
            file.write(json.dumps(values) + "\n")
            if step in validations:
                file.write(json.dumps({"step": step, "bits_per_byte": 1 + 1 / step}) + "\n")
    return path


def test_values_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [4.0, None, 2.0, 1.0], validations=(2, 4), parts=())
    with path.open("a") as file:
        file.write('{"step": 5, "loss": 0.')  # being written
    curves = {name: (steps.tolist(), values.tolist()) for name, (steps, values) in read_curves(path).items()}
    assert curves == {
        "loss": ([1, 3, 4], [4, 2, 1]),
        "lr": ([1, 2, 3, 4], [0.001, 0.002, 0.003, 0.004]),
        "bits_per_byte": ([2, 4], [1.5, 1.25]),
    }


@pytest.mark.parametrize("count", [1, 7, BINS - 1, BINS, BINS + 1, 3 * BINS + 11])
def test_a_smoothed_line_over_what_was_measured(tmp_path, count):
    losses = 1 + np.random.default_rng(0).random(count)
    (axis, rate) = curves_figure(read_curves(write(tmp_path / "metrics.jsonl", losses.tolist()))).axes
    raw, smooth = axis.lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == min(count, BINS)
    if count <= BINS:
        assert raw.get_xdata().tolist() == list(range(1, count + 1))
        assert raw.get_ydata().tolist() == losses.tolist()
        assert not axis.collections
    else:  # means of bins, and the range of all values
        (band,) = axis.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (losses.min(), losses.max())
        widths = np.diff(raw.get_xdata())
        assert widths.max() <= -(-count // BINS)
        assert raw.get_ydata().mean() == pytest.approx(losses.mean(), rel=0.01)
    middle = len(smooth.get_xdata()) // 2
    window = min(25, max(1, min(count, BINS) // 10))
    around = raw.get_ydata()[middle - window // 2 :][:window]
    assert smooth.get_ydata()[middle] == pytest.approx(around.mean(), rel=0.02)
    assert smooth.get_ydata()[0] == pytest.approx(raw.get_ydata()[: -(-window // 2)].mean(), rel=0.02)
    assert np.allclose(rate.lines[0].get_ydata()[[0, -1]], [0.001, count / 1000], rtol=0.1, atol=0.002)


def test_axes_say_what_they_are(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [100.0, 10.0, 1.0], validations=(1, 3), parts=("aim", "ntp"))
    losses, rate, held_out = curves_figure(read_curves(path)).axes
    assert [axis.get_xlabel() for axis in (losses, rate, held_out)] == ["step"] * 3
    assert [axis.get_ylabel() for axis in (losses, rate, held_out)] == [
        "training loss", "learning rate", "held-out text, bits per byte",
    ]  # fmt: skip
    assert [text.get_text() for text in losses.get_legend().texts] == ["sum, scaled to the first", "aim", "ntp"]
    assert [axis.get_yscale() for axis in (losses, rate, held_out)] == ["log", "linear", "linear"]
    assert held_out.lines[0].get_ydata().tolist() == [2, 4 / 3]
    for flat in ([3.0, 2.0, 1.0], [1.0, 0.0, -1.0]):  # a cosine loss may be 0
        assert curves_figure(read_curves(write(path, flat))).axes[0].get_yscale() == "linear"


def test_the_picture_is_written_or_one_line_says_why_not(tmp_path, monkeypatch):
    from matplotlib import pyplot

    told = []
    before = pyplot.get_backend()
    path, picture = write(tmp_path / "metrics.jsonl", [3.0, 2.0]), tmp_path / "curves.png"
    draw_curves(path, picture, told.append)
    assert image.imread(picture).shape == (570, 1440, 4)
    assert told == []
    assert pyplot.get_backend() == before
    assert pyplot.get_fignums() == []
    draw_curves(path, tmp_path / "nowhere" / "curves.png", told.append)
    draw_curves(tmp_path / "nothing.jsonl", picture, told.append)
    (tmp_path / "empty.jsonl").write_text("")
    draw_curves(tmp_path / "empty.jsonl", picture, told.append)
    (tmp_path / "wrong.jsonl").write_text("{}\n[1]\n")
    draw_curves(tmp_path / "wrong.jsonl", picture, told.append)
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    draw_curves(path, picture, told.append)
    assert all(text.startswith("no curves.png: ") and "\n" not in text for text in told)
    assert told[0].endswith(f"No such file or directory: '{tmp_path / 'nowhere' / 'curves.png'}'")
    assert told[1].endswith(f"No such file or directory: '{tmp_path / 'nothing.jsonl'}'")
    assert told[2:] == [
        "no curves.png: no step was written down",
        f"no curves.png: {tmp_path / 'wrong.jsonl'}, line 2: wanted a JSON object with a step and numbers, "
        "got '[1]\\n'",
        f"no curves.png: plots are drawn with matplotlib: {install_line('plot')}",
    ]
