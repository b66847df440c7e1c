"""What slow work gave, kept as it comes."""

import pytest

from matt_fast.support.journal import Journal


def test_what_is_whole_is_read_again_and_what_a_kill_cut_off_is_made_again(tmp_path):
    path, made = tmp_path / "file.jsonl", []

    def make(value):
        return lambda: made.append(value) or value

    journal, text = Journal(path), "ü\n\u2028"
    found = [journal(key, make(value)) for key, value in (("a", [1, 2]), ("b", text), ("a", "other"))]
    assert (found, made) == ([[1, 2], text, [1, 2]], [[1, 2], text])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        made.clear()
        journal = Journal(path)
        assert (journal("a", make([1, 2])), journal("b", make(text))) == ([1, 2], text)
        assert len(made) == 2 - whole[:length].count(b"\n")
        assert path.read_bytes() == whole

    def fails():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        journal("c", fails)
    assert path.read_bytes() == whole
