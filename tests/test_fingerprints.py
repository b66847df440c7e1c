"""Fingerprints of files tell any change of a small file and the replacement of a large one, by name."""

import hashlib
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from matt_fast.support import fingerprints
from matt_fast.support.fingerprints import compare, fingerprint_file, fingerprint_folder, fingerprint_model


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "original").mkdir()
    for name in ("config.json", "tokenizer.json", "README.md", ".gitattributes", "original/params.json"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    generator = np.random.default_rng(0)
    rows = torch.from_numpy(generator.standard_normal((3000, 2000), np.float32))  # 24 MB
    save_file({"a": rows, "b": rows[:7].clone()}, folder / "model.safetensors")
    return folder


def test_small_files_by_content_large_ones_by_samples(folder):
    found = fingerprint_folder(folder)
    assert found.keys() == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "additional_chat_templates/tool.jinja",
    }
    assert found["config.json"] == "sha256:" + hashlib.sha256(b"config.json").hexdigest()
    weights = folder / "model.safetensors"
    times = weights.stat()
    before, size = found["model.safetensors"], times.st_size
    os.utime(weights, ns=(0, 0))
    assert fingerprint_folder(folder) == found  # times do not count
    data = weights.read_bytes()
    places = [3, 100, size - 1, *np.linspace(200, size - 5000, 50).astype(int).tolist()]
    for place in places:  # a stretch longer than the distance of two samples
        changed = bytearray(data)
        changed[place : place + 30_000] = bytes(x ^ 1 for x in changed[place : place + 30_000])
        weights.write_bytes(changed)
        assert fingerprint_file(weights) != before, place
    weights.write_bytes(data + b"\0")
    assert fingerprint_file(weights) != before


def test_the_whole_header_of_safetensors_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "SMALL", 1000)
    for names in ("abc", "abd"):
        file = tmp_path / f"{names}.safetensors"
        save_file({f"layer.{i}.{name}": torch.zeros(3) for i in range(2000) for name in names}, file)
    one, other = ((tmp_path / f"{x}.safetensors").read_bytes() for x in ("abc", "abd"))
    assert len(one) == len(other)
    assert fingerprint_file(tmp_path / "abc.safetensors") != fingerprint_file(tmp_path / "abd.safetensors")


def test_a_model_of_the_hub_is_known_by_its_commit_and_what_is_in_the_cache(tmp_path, folder, monkeypatch):
    asked = []

    def cached(name, file):
        asked.append((name, file))
        return str(folder / file) if file == "tokenizer.json" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    found = fingerprint_model("some/model")
    assert found == {"commit": "model"} | fingerprint_folder(folder)
    assert {name for name, _ in asked} == {"some/model"}
    assert fingerprint_model(folder) == fingerprint_folder(folder)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    with pytest.raises(ValueError, match="'some/model' is no folder here"):
        fingerprint_model("some/model")


def test_differences_are_named_by_file():
    old = {"config.json": "1", "gone.txt": "2", "same": "3", "unknown": None}
    new = {"config.json": "9", "added.txt": "2", "same": "3", "unknown": "8"}
    assert compare(old, new) == ["added.txt is new", "config.json has changed", "gone.txt is gone"]
    assert compare(old, old) == []
    hub, later = {"commit": "a", "config.json": "1"}, {"commit": "a", "config.json": "1", "model.safetensors": "2"}
    assert compare(hub, later) == []
    assert compare(hub, later | {"commit": "b"}) == ["commit has changed: a was, b is"]
    assert compare(hub, later | {"config.json": "2"}) == ["config.json has changed"]
