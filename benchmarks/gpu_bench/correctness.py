"""Errors of the kernels and of the torch engine against float64, beside those of the eager formula."""

from dataclasses import asdict

import numpy as np
import torch
from gpu_bench.engines import eager_fits, loss_of, results
from gpu_bench.failures import Refused, short, stop_if_broken
from gpu_bench.inputs import DTYPES, Shape, make_inputs

NOISES = (None, 1e-3)
QUANTITIES = ("value", "dQ", "dK", "dV")
GROUPS_AT_LENGTH = 4096  # beyond it the first and the last key head are compared, not all


def one_group(inputs, shape: Shape, number: int):
    """The query heads of one key head, as views."""
    teacher, student, *segments = inputs
    queries = slice(number * shape.group, (number + 1) * shape.group)
    keys = slice(number, number + 1)
    return *((x[0][:, queries], x[1][:, keys], x[2][:, keys]) for x in (teacher, student)), *segments


def by_group(engine: str, shape: Shape, inputs, dtype, groups: list[int]) -> list[list[torch.Tensor]]:
    """results of each group of heads, gradients as those of the mean over all groups; all in float64."""
    found = []
    for number in groups:
        value, *gradients = results(engine, shape, one_group(inputs, shape, number), dtype)
        found.append([value.double(), *(x.double() / shape.kv_heads for x in gradients)])
    return found


def of_groups(engine: str, shape: Shape, inputs, groups: list[int]):
    """The same for an engine: gradients from one run at the full shape, values from runs of the groups alone, without
    gradients; and the value of the full run."""
    value, *gradients = results(engine, shape, inputs)
    found = []
    for number in groups:
        own = loss_of(engine, shape, one_group(inputs, shape, number))
        parts = zip(gradients, (shape.group, 1, 1), strict=True)
        found.append([own.detach().double(), *(x[:, number * y : (number + 1) * y].double() for x, y in parts)])
    return found, value.double()


def relative_errors(found, exact) -> list[float]:
    """Of value, dQ, dK, dV, over all groups."""
    errors = []
    for ours, theirs in zip(zip(*found, strict=True), zip(*exact, strict=True), strict=True):
        ours, theirs = torch.stack(ours), torch.stack(theirs)
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    return errors


def engine_errors(engine: str, shape: Shape, inputs, exact, groups: list[int]) -> list[float]:
    found, value = of_groups(engine, shape, inputs, groups)
    errors = relative_errors(found, exact)
    if len(groups) == shape.kv_heads:
        mean = torch.stack([x[0] for x in exact]).mean()
        errors[0] = max(errors[0], float((value - mean).abs() / mean))
    return errors


def limits_of(shape: Shape, eager: list[float]) -> list[float]:
    """Twice eager's own error; a value may be luckier than its rounding, so eps / 64 is always allowed. Four roundings
    of float32 are, everywhere."""
    floor = 2 * torch.finfo(torch.float32).eps
    value = max(2 * eager[0], floor, torch.finfo(DTYPES[shape.dtype]).eps / 64)
    return [value, *(max(2 * x, floor) for x in eager[1:])]


def eager_before(shape: Shape, noise: float | None, earlier: list[dict]) -> dict:
    same = "head_dim", "dtype", "variant", "metric"
    alike = [x for x in earlier if x["noise"] == noise and x["source"] == "eager here"]
    alike = [x for x in alike if all(x["shape"][name] == getattr(shape, name) for name in same)]
    if not alike:
        raise Refused("no shape where the eager formula fits came before: nothing to compare errors with")
    return max(alike, key=lambda x: x["shape"]["length"])


def check(shape: Shape, device: str, earlier: list[dict]) -> list[dict]:
    """One record per noise and engine."""
    return [x for noise in NOISES for x in check_noise(shape, noise, device, earlier)]


def check_noise(shape: Shape, noise: float | None, device: str, earlier: list[dict]) -> list[dict]:
    groups = list(range(shape.kv_heads)) if shape.length <= GROUPS_AT_LENGTH else [0, shape.kv_heads - 1]
    dtype = DTYPES[shape.dtype]
    has_eager = eager_fits(shape, torch.finfo(dtype).bits // 8, device, shape.group)
    reference = "eager" if eager_fits(shape, 8, device, shape.group) else "torch"
    before = None if has_eager else eager_before(shape, noise, earlier)
    found, failed = {"eager": [], "triton": [], "torch": []}, {}
    draws = 2 if device == "cpu" else 8 if shape.length <= 512 else 1  # the dry run takes long enough
    for seed in range(draws):
        inputs = make_inputs(shape, noise, device, seed)
        exact = by_group(reference, shape, inputs, torch.float64, groups)
        if has_eager:
            try:
                found["eager"].append(relative_errors(by_group("eager", shape, inputs, dtype, groups), exact))
            except torch.OutOfMemoryError:  # its size was an estimate
                torch.cuda.empty_cache()
                has_eager, before = False, eager_before(shape, noise, earlier)
        for engine in ("triton", "torch"):
            try:
                found[engine].append(engine_errors(engine, shape, inputs, exact, groups))
            except Exception as error:
                failed[engine] = short(error)
                stop_if_broken(device, failed[engine])
    # Root mean squares: one draw of a rounding error can be zero by luck.
    errors = {x: np.sqrt(np.mean(np.square(y), 0)).tolist() for x, y in found.items() if y}
    eager = errors["eager"] if has_eager else before["eager"]
    source = "eager here" if has_eager else f"eager at n={before['shape']['length']}"
    shared = {"noise": noise, "shape": asdict(shape), "reference": f"{reference} float64", "groups": len(groups)}
    shared |= {"eager": eager, "source": source}
    limits = limits_of(shape, eager)
    records = []
    for engine in ("triton", "torch"):
        if engine in failed:
            records.append({**shared, "engine": engine, "passed": False, "error": failed[engine]})
            continue
        passed = all(x <= y for x, y in zip(errors[engine], limits, strict=True))
        records.append({**shared, "engine": engine, "passed": passed, "errors": errors[engine]})
    return records
