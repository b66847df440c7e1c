"""Two files of results side by side: time and memory of the benchmarks that are in both, B / A.

    make bench-compare A=theirs.json B=benchmarks/results.json

pytest-benchmark's own `compare --between` shows times only: neither peak memory, nor under which conditions they were
taken, nor what is in one file alone.
"""

import argparse
import sys

from report import conditions, load, number, table

TIMES = ("min", "best"), ("median", "median")


def differing(a: dict, b: dict) -> list[list[str]]:
    """[name, value in A, value in B] of the conditions that are not the same."""
    return [[x, a.get(x, "-"), b.get(x, "-")] for x in dict.fromkeys([*a, *b]) if a.get(x) != b.get(x)]


def cells(a: float | None, b: float | None) -> list[str]:
    if a is None or b is None:
        return ["-" if x is None else number(x) for x in (a, b)] + ["-"]
    return [number(a), number(b), f"{b / a:.2f}" if a else "-"]


def compare(a: dict, b: dict) -> str:
    sides = [{x["fullname"]: x for x in results["benchmarks"]} for results in (a, b)]
    rows, shapes = [], []
    for name in sides[0].keys() & sides[1].keys():
        one, other = (side[name] for side in sides)
        row = [name.split("::")[-1]]
        for key, _ in TIMES:
            row += cells(*(x["stats"][key] * 1e3 for x in (one, other)))
        rows.append(row + cells(*(x["extra_info"].get("peak MiB") for x in (one, other))))
        infos = [
            {k: str(v) for k, v in x["extra_info"].items() if k not in ("peak MiB", "relative error")}
            for x in (one, other)
        ]
        shapes += [[row[0], *line] for line in differing(*infos)]
    head = ["benchmark"]
    for label in (*(f"{word}, ms" for _, word in TIMES), "peak, MiB"):
        head += [f"A {label}", f"B {label}", "B / A"]
    parts = ["Conditions that differ:", table(["", "A", "B"], differing(conditions(a), conditions(b)))]
    if shapes:
        parts += [
            "Benchmarks of the same name that measured something else:",
            table(["", "", "A", "B"], sorted(shapes)),
        ]
    parts.append(table(head, sorted(rows)) if rows else "No benchmark is in both.")
    for label, names in (("A", sides[0].keys() - sides[1].keys()), ("B", sides[1].keys() - sides[0].keys())):
        if names:
            parts.append("\n".join([f"Only in {label}:", *(f"- {x.split('::')[-1]}" for x in sorted(names))]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--a", default="")
    parser.add_argument("--b", default="")
    given = vars(parser.parse_args())
    try:
        for name, path in given.items():
            if not path:
                usage = "make bench-compare A=theirs.json B=ours.json"
                raise ValueError(f"{name.upper()}: wanted a file of results ({usage}); got nothing")
        print(compare(load(given["a"]), load(given["b"])))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
