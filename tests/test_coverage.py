"""Chunks that come first, so that every new token comes often enough."""

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import files  # noqa: F401, a fixture

from matt_fast import TrainingOptions, transfer
from matt_fast.data.coverage import cover


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_token_comes_often_enough_or_as_often_as_there_is_any(tmp_path_factory, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=30))
    rows = [generator.integers(0, 25, size) for size in sizes]
    folder = tmp_path_factory.mktemp("chunks") / "data"
    Dataset.from_dict({"student_ids": rows}).save_to_disk(folder)
    wanted = data.draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    per_token = data.draw(st.integers(1, 6))
    found = cover([folder], wanted, per_token, 0)
    assert len(set(found.chunks.tolist())) == len(found.chunks)
    everywhere = Counter(np.concatenate(rows).tolist())
    first = Counter(np.concatenate([rows[i] for i in found.chunks] or [[]]).tolist())
    for token in wanted:
        assert first[token] >= min(per_token, everywhere[token])
    assert found.enough == sum(everywhere[x] >= per_token for x in wanted)
    assert found.absent == sum(everywhere[x] == 0 for x in wanted)
    assert found.enough + found.fewer + found.absent == len(wanted)
    for chunk in found.chunks:  # none is there for nothing
        assert set(rows[chunk].tolist()) & set(wanted)


def test_a_run_reads_them_first(files, tmp_path):  # noqa: F811
    """As soon as the chunks that were told are read, each new token that the text has was seen."""
    given = {name: value for name, value in files.items() if "eval" not in name} | {"batch_size": 1}
    messages = []
    options = TrainingOptions(objective="aim", steps=1)
    transfer(**given, output=tmp_path / "short", training=options, per_token=1, on_message=messages.append)
    (line,) = [x for x in messages if x.startswith("per_token: ")]
    enough, chunks = int(line.split()[1]), int(line.split("first ")[1].split()[0])
    assert 1 < chunks < 60
    result = transfer(
        **given, output=tmp_path / "long", training=TrainingOptions(objective="aim", steps=chunks), per_token=1
    )
    assert result.seen == enough
    with pytest.raises(ValueError, match="per_token: wanted at least 1, got 0"):
        transfer(**given, output=tmp_path / "x", per_token=0)
