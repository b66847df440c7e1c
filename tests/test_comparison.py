"""Initialisers side by side, before and behind a short training."""

import pytest
from test_runs import files  # noqa: F401, a fixture

from matt_fast import TrainingOptions, compare_initializers, transfer


def test_a_probe_gives_what_a_transfer_of_its_steps_gives(files, tmp_path):  # noqa: F811
    probe = TrainingOptions(objective="ntp", steps=3, lr=1e-2)
    names = ("model", "tokenizer", "data", "eval_data", "eval_pieces", "max_length", "batch_size", "device")
    given = {name: files[name] for name in names}
    _, (mean, random) = compare_initializers(**given, inits=["mean", "random"], probe=probe)
    for found, init in ((mean, "mean"), (random, "random")):
        expected = transfer(**given, output=tmp_path / init, init=init, training=probe).evaluations
        assert found.bits_per_byte == pytest.approx(expected["initialised"].bits_per_byte, rel=1e-6)
        assert found.probed == pytest.approx(expected["trained"].bits_per_byte, rel=1e-6)
    with pytest.raises(ValueError, match="data: wanted text to train on for the probe, got none"):
        compare_initializers(**given | {"data": None}, inits=["mean"], probe=probe)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eval_pieces", 0), ("omp_k", 0), ("max_length", 0), ("batch_size", -1), ("seed", -1), ("init_head", "x"),
     ("device", "x")],
)  # fmt: skip
def test_arguments_are_refused_as_by_the_command_line(files, name, value):  # noqa: F811
    given = {x: files[x] for x in ("model", "tokenizer", "eval_data")}
    with pytest.raises((ValueError, OSError), match=f"^{name}: wanted"):
        compare_initializers(**given | {name: value}, inits=["mean"])
