"""The scripts for a lent GPU: every part of them on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu_bench"


def run(name: str, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"OUT": str(folder)}
    command = [sys.executable, str(SCRIPTS / name), "--dry-run", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=folder).stdout


def test_probe(tmp_path):
    parts = "kernels", "host", "plan_on_the_device", "attention", "bits"
    run("probe.py", tmp_path, "--parts", *parts)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [x.removeprefix("d=64 ").replace(" ", "_") for x in found] == list(parts)
    assert found["d=64 bits"] == {"runs that differ": 0, "finite": True}


def test_decide(tmp_path):
    run("decide.py", tmp_path)
    found = json.loads((tmp_path / "decide.json").read_text())
    assert {x.split()[0] for x in found} == {"errors", "ms", "shapes", "plans"}
    for metric in ("mse", "cosine"):
        errors, times = found[f"errors {metric} d=16 n=40"], found[f"ms {metric} d=16 n=40"]
        assert errors["grouped passed"]
        assert max(times["differences"]) < 1e-2
        assert times["same bits"]


def test_transfer(tmp_path):
    run("transfer.py", tmp_path, "--ways", "0", "8")
    records = [json.loads(x) for x in (tmp_path / "transfer.jsonl").read_text().splitlines()]
    assert not any("error" in x for x in records)
    starts, trials, trained, speed = (
        [x for x in records if begins in x["run"]] for begins in ("start: ", "trial: ", "seed 0: ", "speed: ")
    )
    assert [len(starts), len(trials), len(trained), len(speed)] == [2, 2, 2, 7]
    assert all(x["bits per byte"]["held out"] > 0 for x in starts + trained)
    assert all("bits per byte" not in x for x in trials)
    assert all(x["steps"] >= 2 and x["by clock"] > 0 for x in trained)


def test_a_file_travels_in_halves(tmp_path):
    from benchmarks.gpu_bench.pack import halve

    folders = tmp_path / "one", tmp_path / "two"
    (tmp_path / "model.gguf").write_bytes(bytes(range(251)))
    for folder in folders:
        folder.mkdir()
    halve(tmp_path / "model.gguf", folders)
    parts = [folder / f"part0{number}" for number, folder in enumerate(folders)]
    assert [part.stat().st_size for part in parts] == [126, 125]
    assert b"".join(part.read_bytes() for part in parts) == bytes(range(251))
