"""From results to tables, slopes and a plot: RESULTS.md and loss.png.

    .venv/bin/python benchmarks/report.py [RUN.json]     a run of pytest-benchmark is kept in results.json; `make bench`

Without a file the tables are made anew of results.json and steps.json (`make bench-steps`).
"""

import io
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

from usage import arguments

HERE = Path(__file__).parent
LOSS_AXES = ("n", "variant", "metric", "head_dim", "dtype", "part")
BASE = {"variant": "aim", "metric": "mse", "head_dim": 64, "dtype": "float32", "part": "both"}
ENGINES = ("triton", "torch", "eager", "compiled eager", "sdpa")
MEASURED = ("peak MiB", "relative error")
LARGER = 2048  # slopes are fitted from here on, where an engine has three lengths; below, fixed workspaces count
STATS = ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "rounds", "iterations")
MIB = 1 << 20

# Files


def load(path: str | Path) -> dict:
    """A file that pytest-benchmark wrote.

    Raises:
        ValueError: there is none, or it is something else; the message says what was wanted and what came.
    """
    wanted = "wanted a file that pytest-benchmark wrote (--benchmark-json)"
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path}: {wanted}; got {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {wanted}; got no JSON: {error}") from error
    missing = [
        x for x in ("machine_info", "commit_info", "benchmarks") if not isinstance(found, dict) or x not in found
    ]
    if missing:
        raise ValueError(f"{path}: {wanted}; got JSON without {', '.join(missing)}")
    return found


def slim(results: dict) -> dict:
    """The same without the time of every round and what is computed from others; pytest-benchmark still reads it."""
    benchmarks = [x | {"stats": {name: x["stats"][name] for name in STATS}} for x in results["benchmarks"]]
    return results | {"benchmarks": benchmarks}


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing: a reader never sees half a file."""
    data = content if isinstance(content, bytes) else content.encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


# Tables


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that count."""
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def cell(value) -> str:
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def conditions(results: dict) -> dict[str, str]:
    """Machine, versions, commit and date of a run, as text."""
    commit = results["commit_info"]
    found = {key: "none" if value is None else str(value) for key, value in results["machine_info"].items()}
    found["commit"] = str(commit.get("id"))[:12] + (", with changes not committed" if commit.get("dirty") else "")
    return found | {"date": str(results.get("datetime"))[:16]}


def condition_table(results: dict) -> str:
    return table(["condition", "value"], [list(x) for x in conditions(results).items()])


def every_benchmark(records: list[dict]) -> str:
    """One row each: what differs within the group, then times with their spread, then memory."""
    infos = [x["extra_info"] for x in records]
    names = [x for x in dict.fromkeys(key for info in infos for key in info) if x not in MEASURED]
    varying = [x for x in names if len({str(info.get(x)) for info in infos}) > 1]
    fixed = ", ".join(f"{x} {cell(infos[0][x])}" for x in names if x not in varying)
    measured = [x for x in MEASURED if any(x in info for info in infos)]
    head = [*varying, "best, ms", "median", "quartiles", "rounds", *measured]
    rows = []
    for info, stats in zip(infos, (x["stats"] for x in records), strict=True):
        times = [number(stats[x] * 1e3) for x in ("min", "median")]
        spread = " to ".join(number(stats[x] * 1e3) for x in ("q1", "q3"))
        extra = ["" if info.get(x) is None else f"{info[x]:.1e}" if "error" in x else number(info[x]) for x in measured]
        row = [*(cell(info.get(x, "")) for x in varying), *times, spread, str(stats["rounds"]), *extra]
        rows.append(row)
    return (f"All: {fixed}.\n\n" if fixed else "") + table(head, rows)


def by_group(results: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in results["benchmarks"]:
        groups.setdefault(record["group"] or "others", []).append(record)
    return groups


# The loss


def loss_cases(records: list[dict]) -> dict[tuple, dict[str, tuple[float, float]]]:
    """(best seconds, peak MiB) by case and engine; SDPA is the yardstick of every variant and metric."""
    cases: dict[tuple, dict] = {}
    yardsticks = {}
    for record in records:
        info = record["extra_info"]
        key, value = tuple(info[x] for x in LOSS_AXES), (record["stats"]["min"], info["peak MiB"])
        if info["engine"] == "sdpa":
            yardsticks[key[:1] + key[3:]] = value
        cases.setdefault(key, {})[info["engine"]] = value
    for key, engines in cases.items():
        if key[:1] + key[3:] in yardsticks:
            engines["sdpa"] = yardsticks[key[:1] + key[3:]]
    return cases


def loss_table(records: list[dict], what: int) -> str:
    """Best times in ms (what=0) or peaks in MiB (what=1), and their ratios."""
    cases = loss_cases(records)
    engines = [x for x in ENGINES if any(x in found for found in cases.values())]
    ours = next(x for x in engines if x in ("triton", "torch"))
    head = [*LOSS_AXES, *engines, f"eager / {ours}", f"{ours} / sdpa"]
    rows = []
    for key in sorted(cases, key=lambda x: (x[1:] != tuple(BASE.values()), x[1:], x[0])):
        values = {engine: value[what] for engine, value in cases[key].items()}
        ratios = [number(values[x] / values[y]) if values.get(y) and x in values else "" for x, y in
                  (("eager", ours), (ours, "sdpa"))]  # fmt: skip
        scale = 1 if what else 1e3
        rows.append([*map(cell, key), *(number(values[x] * scale) if x in values else "" for x in engines), *ratios])
    return table(head, rows)


def lines(records: list[dict]) -> dict[str, tuple[list[int], list[float], list[float]]]:
    """(lengths, seconds, MiB) of each engine along the axis of lengths."""
    base = {key: found for key, found in loss_cases(records).items() if key[1:] == tuple(BASE.values())}
    drawn = {}
    for engine in ENGINES:
        points = [(key[0], *found[engine]) for key, found in sorted(base.items()) if engine in found]
        if len(points) > 1:
            drawn[engine] = tuple(map(list, zip(*points, strict=True)))
    return drawn


def slope(lengths: list[int], values: list[float]) -> tuple[float, list[int]]:
    """Of a line through the logarithms, and the lengths that it is fitted to: the larger ones, three at least."""
    points = [(n, y) for n, y in zip(lengths, values, strict=True) if n >= LARGER]
    points = points if len(points) >= 3 else list(zip(lengths, values, strict=True))[-3:]
    x, y = ([math.log(value) for value in side] for side in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope, [n for n, _ in points]


def slope_table(records: list[dict]) -> str:
    rows = []
    for engine, (lengths, seconds, mebibytes) in lines(records).items():
        (time_slope, fitted), (memory_slope, _) = slope(lengths, seconds), slope(lengths, mebibytes)
        rows.append([engine, f"{time_slope:.2f}", f"{memory_slope:.2f}", f"{fitted[0]:,} to {fitted[-1]:,}"])
    return table(["engine", "slope of time", "slope of memory", "tokens"], rows)


def plot(records: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, what, label in zip(panels, (1, 2), ("time, ms", "peak memory, MiB"), strict=True):
        for engine, found in lines(records).items():
            values = [x * 1e3 for x in found[1]] if what == 1 else found[2]
            name = "SDPA" if engine == "sdpa" else engine
            panel.loglog(found[0], values, marker="o", label=f"{name}: slope {slope(found[0], values)[0]:.2f}")
        lengths = sorted({n for found in lines(records).values() for n in found[0]})
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
        panel.minorticks_off()
        panel.set(xlabel="teacher tokens", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", fontsize="small")
    figure.suptitle("AIM loss, forward and backward, float32, head_dim 64, beside SDPA of the student's shape")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    pyplot.close(figure)
    write(path, picture.getvalue())


# The step

STEP_HEAD = table(
    ["tokens, teacher and student", "reference, s", "ours, s", "ratio", "reference, MiB", "ours, MiB", "ratio"], []
)


def best(found: dict) -> float:
    """Seconds of the best step after the first, or of the only one."""
    return min(found["seconds"][1:] or found["seconds"])


def step_row(record: dict) -> str:
    ours, reference = record["ours"], record["reference"]
    row = [" and ".join(f"{x:,}" for x in ours["tokens"]) + (" (one step)" if record["steps"] == 1 else "")]
    for measure, digits in ((best, 2), (lambda x: x["peak"] / MIB, 0)):
        mine = measure(ours)
        theirs = None if reference is None else measure(reference)
        row += ["" if theirs is None else f"{theirs:,.{digits}f}", f"{mine:,.{digits}f}"]
        row.append("" if theirs is None else f"{theirs / mine:.1f}")
    return f"| {' | '.join(row)} |"


def longest_within(records: list[dict], way: str, mebibytes: int = 8192) -> tuple[int, bool]:
    """The tokens at which memory reaches so much, on a line through the logarithms of the two measured lengths nearest
    to it; and whether it lies beyond what was measured."""
    points = sorted((x[way]["tokens"][0], x[way]["peak"] / MIB) for x in records if x[way] is not None)
    (n0, y0), (n1, y1) = sorted(sorted(points, key=lambda x: abs(math.log(x[1] / mebibytes)))[:2])
    tokens = n0 * (mebibytes / y0) ** (math.log(n1 / n0) / math.log(y1 / y0))
    return round(tokens), tokens > points[-1][0]


def steps_section(steps: dict) -> list[str]:
    records = steps["steps"]
    text = [
        "## A training step, beside the reference library's way",
        "`make bench-steps`: SmolLM2-135M up to layer 10 of 30, float32, objective `aim`, one chunk of code. Seconds",
        "(best step after the first) are processor time of one thread: other work on the machine does not count.",
        "Memory is that of the process above what it had before the model was loaded.",
    ]
    parts = [text[0], "\n".join(text[1:]), condition_table(steps), "\n".join([STEP_HEAD, *map(step_row, records)])]
    within = []
    for way, name in (("reference", "the reference's way"), ("ours", "ours")):
        if sum(x[way] is not None for x in records) > 1:
            tokens, beyond = longest_within(records, way)
            within.append(f"{name} about {tokens:,} tokens ({'extrapolated' if beyond else 'between two measured'})")
    parts.append(f"In 8 GiB: {'; '.join(within)}.")
    if steps["profiles"]:
        parts += ["### Where the time of our step goes", profile_tables(steps["profiles"])]
    return parts


def profile_tables(profiles: list[dict]) -> str:
    """Shares of parts and of operators, one column for each length."""
    found = []
    for kind in ("parts", "operators"):
        names = dict.fromkeys(name for x in profiles for name in x[kind])
        head = [kind[:-1], *(f"{x['tokens']:,} tokens" for x in profiles)]
        rows = [[name, *(f"{x[kind][name]:.1%}" if name in x[kind] else "" for x in profiles)] for name in names]
        found.append(table(head, rows))
    note = "Wall time under torch.profiler, batch of one, data made in a worker. The loss of the torch engine includes"
    return "\n\n".join([f"{note}\nits gradients; operators are counted without what they call.", *found])


# RESULTS.md


def loss_section(records: list[dict]) -> list[str]:
    note = [
        "The step adds so much to its inputs at its peak, in a process of its own; values and gradients were checked",
        "against float64 before. `torch` computes its gradients in the forward pass: its backward only hands them out.",
        "`sdpa` is one attention of the student's shape, its time the same for every variant and metric.",
    ]
    parts = ["## Loss", "Best round, ms:", loss_table(records, 0), "Peak memory, MiB:", loss_table(records, 1)]
    parts.insert(1, "\n".join(note))
    if lines(records):
        words = "Slopes of the logarithms, over the larger lengths (wanted of memory: 1.0 ± 0.05; the formula has 2.0):"
        parts += ["![time and memory over the length](loss.png)", words, slope_table(records)]
    return parts


def render(results: dict, steps: dict | None) -> str:
    """RESULTS.md."""
    clock = results["machine_info"].get("clock", "wall clock")
    words = f"Written by `make bench` and `make bench-steps`. Times of `make bench` are {clock}."
    parts = ["# Benchmark results", words, condition_table(results)]
    groups = by_group(results)
    if "loss" in groups:
        parts += loss_section(groups["loss"])
    if steps is not None:
        parts += steps_section(steps)
    parts.append("## Every benchmark, with its spread")
    for name, records in groups.items():
        parts += [f"### {name}", every_benchmark(records)]
    return "\n\n".join(parts) + "\n"


def main(run: str | None = None) -> None:
    kept = HERE / "results.json"
    results = slim(load(kept if run is None else run))
    steps = json.loads((HERE / "steps.json").read_text()) if (HERE / "steps.json").exists() else None
    if run is not None:
        write(kept, json.dumps(results, indent=1) + "\n")
    write(HERE / "RESULTS.md", render(results, steps))
    records = by_group(results).get("loss", [])
    if lines(records):
        plot(records, HERE / "loss.png")
        print(slope_table(records))
    print(f"written: {HERE / 'RESULTS.md'}")


if __name__ == "__main__":
    try:
        main(*arguments(__doc__, str))
    except ValueError as error:
        sys.exit(str(error))
