"""What is made of benchmark results: slopes, tables, comparisons, errors; and each loss case at a tiny size."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_loss
import compare
import report
import usage
from bench_loss import Case

STATS = {"max": 1.0, "mean": 1.0, "stddev": 0.1, "iqr": 0.1, "q1": 1.0, "q3": 1.1, "rounds": 3, "iterations": 1}


def benchmark(case: Case, seconds: float, mebibytes: float, **more) -> dict:
    info = asdict(case) | {"peak MiB": mebibytes, "device": "cpu"} | more
    stats = STATS | {"min": seconds, "median": 2 * seconds, "data": [seconds] * 3}
    name = f"benchmarks/bench_loss.py::test_loss[{case}]"
    return {"group": "loss", "name": name, "fullname": name, "extra_info": info, "stats": stats}


def results(engines=("torch", "eager", "sdpa"), **machine) -> dict:
    """Time goes with the square of the length; memory too for the eager formula, else with the length."""
    lengths = {"eager": (64, 128, 256, 512)}
    found = [
        benchmark(Case(engine, n), n**2 * 1e-6, n**2 / 1e3 if engine == "eager" else n / 10)
        for engine in engines
        for n in lengths.get(engine, (256, 512, 2048, 4096, 16384))
    ]
    found.append(benchmark(Case("torch", metric="cosine"), 0.5, 60.0))
    return {
        "machine_info": {"cpu": "a CPU", "torch": "2.0", "threads": 1} | machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": found,
    }


def save(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path


def step(length: int, ours: float, reference: float | None) -> dict:
    def side(mebibytes):
        return {"tokens": [length, length - 9], "seconds": [9.0, 2.0, 1.0], "peak": mebibytes * 2**20}

    return {"length": length, "steps": 3, "ours": side(ours), "reference": reference and side(reference)}


def test_slopes_of_power_laws():
    drawn = report.lines(results()["benchmarks"])
    (lengths, seconds, mebibytes), eager = drawn["torch"], drawn["eager"]
    assert report.slope(lengths, seconds) == (pytest.approx(2), [2048, 4096, 16384])
    assert report.slope(lengths, mebibytes)[0] == pytest.approx(1)
    assert report.slope(eager[0], eager[2]) == (pytest.approx(2), [128, 256, 512])
    # what does not grow with the length counts for little at the larger ones
    assert report.slope(lengths, [x + 5 for x in mebibytes])[0] == pytest.approx(1, abs=0.05)


def test_results_are_kept_without_every_round(tmp_path):
    slim = report.slim(results())
    assert "data" not in slim["benchmarks"][0]["stats"]
    assert slim["benchmarks"][0]["stats"]["median"] == 2 * slim["benchmarks"][0]["stats"]["min"]
    assert report.load(save(tmp_path / "slim.json", slim)) == slim


def test_tables(tmp_path):
    text = report.render(results(), None)
    assert "| 512 | aim | mse | 64 | float32 | both | 262 | 262 | 262 | 1.00 | 1.00 |" in text
    assert "| 512 | aim | mse | 64 | float32 | both | 51.2 | 262 | 51.2 | 5.12 | 1.00 |" in text
    assert "| 512 | aim | cosine | 64 | float32 | both | 500 |  | 262 |  | 1.91 |" in text
    assert "| torch | 2.00 | 1.00 | 2,048 to 16,384 |" in text
    assert "| commit | 0123456789ab |" in text
    report.plot(results()["benchmarks"], tmp_path / "loss.png")
    assert [x.name for x in tmp_path.iterdir()] == ["loss.png"]


def test_step_tables():
    records = [step(512, 500, 2048), step(1024, 1000, 8192), step(2048, 2000, None)]
    assert report.step_row(records[0]) == "| 512 and 503 | 1.00 | 1.00 | 1.0 | 2,048 | 500 | 4.1 |"
    assert report.longest_within(records, "reference") == (1024, False)
    assert report.longest_within(records, "ours") == (pytest.approx(8389, abs=1), True)
    profiles = [{"tokens": 512, "parts": {"loss": 0.1}, "operators": {"aten::mm": 0.5}}]
    text = report.render(results(), results() | {"steps": records, "profiles": profiles})
    assert "ours about 8,389 tokens (extrapolated)" in text
    assert "| loss | 10.0% |" in text


def test_compare():
    one, other = results(), results(engines=("torch", "sdpa"), torch="2.1")
    other["commit_info"]["dirty"] = True
    for record in other["benchmarks"]:
        record["stats"]["min"] /= 2
        record["extra_info"]["peak MiB"] *= 3
    other["benchmarks"].append(benchmark(Case("triton"), 1, 1))
    other["benchmarks"][0]["extra_info"]["device"] = "cuda"
    text = compare.compare(one, other)
    assert "| torch | 2.0 | 2.1 |" in text
    assert "| commit | 0123456789ab | 0123456789ab, with changes not committed |" in text
    assert "a CPU" not in text
    line = "| test_loss[torch-512-64-float32-aim-mse-both] | 262 | 131 | 0.50 | 524 | 524 | 1.00 | 51.2 | 154 | 3.00 |"
    assert line in text
    assert "| test_loss[torch-256-64-float32-aim-mse-both] | device | cpu | cuda |" in text
    only_a, only_b = text.split("Only in A:")[1].split("Only in B:")
    assert only_a.count("eager") == 4
    assert only_b.split() == ["-", "test_loss[triton-512-64-float32-aim-mse-both]"]


@pytest.mark.parametrize(
    ("a", "message"),
    [
        ("", "A: wanted a file of results .* got nothing"),
        ("none.json", "none.json: wanted a file that pytest-benchmark wrote .* got No such file"),
        ("text.json", "text.json: wanted .* got no JSON"),
        ("list.json", "list.json: wanted .* got JSON without machine_info, commit_info, benchmarks"),
    ],
)
def test_compare_refuses(tmp_path, monkeypatch, a, message):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("# no JSON")
    Path("list.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--a", a, "--b", str(save(tmp_path / "b.json", results()))])
    with pytest.raises(SystemExit, match=message):
        compare.main()


TINY = {replace(case, n=24) for case in bench_loss.cases() if case.engine != "compiled eager"}


@pytest.mark.parametrize("case", sorted(TINY, key=str), ids=str)
def test_loss_cases(case):
    assert bench_loss.relative_error(case) >= 0
    prepare, run = bench_loss.part_of(case)
    run(*prepare())


def test_each_script_tells_what_it_takes():
    for script in sorted(Path(report.__file__).parent.rglob("*.py")):
        text = script.read_text()
        if "__main__" in text:
            assert any(x in text for x in ("ArgumentParser(", "typer.run(", "arguments(__doc__")), script


@pytest.mark.parametrize(
    ("given", "status", "said"), [("--help", 0, "What it is."), ("3 x", 2, "got 3 x, wanted"), ("", 2, "got no arg")]
)
def test_usage(given, status, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *given.split()])
    with pytest.raises(SystemExit) as ended:
        usage.arguments("\nWhat it is.\n", int, least=1)
    assert ended.value.code in ({0, None} if status == 0 else {status})
    output = capsys.readouterr()
    assert said in (output.out if status == 0 else output.err)


def test_usage_gives_arguments_of_their_kinds(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "3", "a", "b"])
    assert usage.arguments("", int, str) == [3, "a", "b"]
