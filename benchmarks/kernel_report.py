"""What every kernel compiles to, without a GPU: spills, shared memory, occupancy, tensor cores, wide loads.

    make kernel-report                                      # writes benchmarks/KERNELS.md and benchmarks/kernels.json
    python benchmarks/kernel_report.py --everything         # the same for every dtype, size and target: hours
    python benchmarks/kernel_report.py --check [--subset]   # exits 1 where a kernel got worse than kernels.json

The custom ops run on meta tensors with Triton's launch replaced by a recorder, so that signatures, constants and tile
shapes are those of a real launch on that target. Compiled code is read with the tools of Triton's wheel: ptxas says
what it spilled, nvdisasm shows the instructions, and AMD's assembly has both. Rows are cached by kernel and options.
"""

import hashlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import triton
import typer
from kernel_code import CARDS, KIB, count_products, occupancy, parse_amdgcn, parse_ptxas, parse_sass
from matt_kernels import AimPlan, configs, ops
from matt_kernels.device_plan import make_device_plan
from matt_kernels.softmax import softmax_rows
from rich.progress import Progress
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "matt-fast" / "kernel-report"
LENGTHS = 1000, 800  # teacher and student tokens; kernels are the same for others
ROW_VERSION = 3  # part of the cache key: what compile_row returns
# What kernels.json has of a row: for --check, and for the cost model.
COMMITTED = "name", "spill_stores", "spill_loads", "products", "tensor_products", "warps", "occupancy", "loop"


# Head dimensions at which no main loop of bfloat16 may spill.
CLEAN = ("64", "96", "128")


@dataclass(frozen=True)
class Case:
    dtype: str
    head_dim: int
    softcap: bool = False


CASES = [Case("bfloat16", x) for x in (64, 80, 96, 128, 256)]
CASES += [Case("bfloat16", x, softcap=True) for x in (64, 128, 256)]
CASES += [Case(x, y) for x in ("float16", "float32") for y in (64, 128, 256)]
# What is compiled: always for the tests, for the committed tables and the cost model, and on demand.
SUBSET = [(Case("bfloat16", 64), "sm_80"), (Case("bfloat16", 128), "sm_90"), (Case("bfloat16", 64), "gfx942")]
SUBSET += [(Case("float32", 64), "sm_80")]
TABLES = [*SUBSET, (Case("bfloat16", 64), "sm_90"), (Case("bfloat16", 128), "sm_80")]
ALL = [(case, target) for case in CASES for target in CARDS]


# Recording launches


@dataclass(frozen=True)
class Job:
    """One kernel to compile; plain values only, so that another process can."""

    module: str
    kernel: str
    target: str
    dtype: str
    head_dim: int
    softcap: bool
    loss: str  # the first to launch it: the metric, "star" or "star cosine" (and tiles, if others), "update" or "plan"
    signature: dict
    constants: dict
    attributes: dict
    options: dict

    @property
    def variant(self) -> str:
        """The flags that change what a kernel does."""
        mean_key = "mean key" if self.constants.get("MEAN_KEY") else ""
        return " ".join(x for x in (self.loss, mean_key, "softcap" if self.softcap else "") if x)

    @property
    def name(self) -> str:
        words = self.kernel.removesuffix("_kernel"), self.variant, self.dtype, f"d={self.head_dim}", self.target
        return " ".join(x for x in words if x)

    def key(self) -> str:
        """Of the cache: the kernel's source with all that it calls, and everything the compiler is told."""
        told = asdict(self) | {"source": kernel_of(self).cache_key, "triton": triton.__version__, "row": ROW_VERSION}
        return hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()


def kernel_of(job: Job) -> JITFunction:
    return getattr(importlib.import_module(job.module), job.kernel)


def gpu_target(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def config_target(name: str) -> str:
    """The name that configs.choose_config knows a target by."""
    return "hip" if name.startswith("gfx") else f"cuda:{name[3:]}"


def record_launches(case: Case, target: str) -> list[Job]:
    """Every kernel that loss and gradients of both variants launch, and the update of rows in float32, each once."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((label, kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(configs, "target_of", return_value=config_target(target)),
    ):
        for (variant, run), metric in product((("aim", run_aim), ("aim_star", run_aim_star)), ("mse", "cosine")):
            query = meta_inputs(case)[1][0]
            loss = metric if variant == "aim" else "star" if metric == "mse" else "star cosine"
            for lopsided in (False, True):
                widths = ops.config_for(query, query, variant, metric, lopsided=lopsided).widths
                label = "{} {}x{}".format(loss, *widths) if widths[0] > widths[1] else loss
                run(case, metric, widths)
        if case.dtype == "float32":
            label = "update"
            run_update(case)
        if case == Case("float32", 64):
            label = "plan"
            run_plan()
    jobs = {}
    for launch in launches:
        job = make_job(case, target, *launch)
        # The sides of attend differ in one constant, and metrics share some kernels.
        constants = {x: y for x, y in job.constants.items() if x != "SIDE"}
        jobs.setdefault(repr((job.kernel, job.signature, constants, job.options)), job)
    return list(jobs.values())


def meta_inputs(case: Case, widths: tuple[int, int] = (16, 16)):
    """(teacher, student, plan) of a model with grouped heads, laid out as [batch, tokens, heads, size]."""
    dtype, batch, lengths = getattr(torch, case.dtype), 2, LENGTHS
    sides = [
        tuple(
            torch.empty(batch, n, heads, case.head_dim, dtype=dtype, device="meta").transpose(1, 2)
            for heads in (32, 8, 8)
        )
        for n in lengths
    ]
    ids = [torch.empty(batch, n, dtype=torch.int64, device="meta") for n in lengths]
    plan = ops.aim_plan_op(*ids, None, None, *widths, "aim", True, None, "pairs")
    return *sides, list(plan)


def run_aim(case: Case, metric: str, widths: tuple[int, int]) -> None:
    """All that a step launches, and softmax as it is where queries need no gradient."""
    teacher, student, plan = meta_inputs(case, widths)
    options = metric, case.head_dim**-0.5, 50.0 if case.softcap else None
    common = *teacher, *student, plan, *widths, True, *options
    _, *kept = body(ops.aim_forward)(*common, 1, True, True, True)
    body(ops.aim_backward)(*common, kept, kept[0], True, True)
    plan = AimPlan(*plan, widths, "aim")
    config = ops.config_for(student[0], student[2], "aim", metric, lopsided=widths[0] > widths[1], softcap=case.softcap)
    softmax_rows(teacher, student, kept[2].unbind(), plan, config, ops.Options(*options[1:]))


def run_aim_star(case: Case, metric: str, widths: tuple[int, int]) -> None:
    teacher, student, plan = meta_inputs(case, widths)
    options = case.head_dim**-0.5, 50.0 if case.softcap else None
    _, *kept = body(ops.attend_forward)(*teacher, *student, plan, *widths, metric, *options, 1, True)
    body(ops.attend_backward)(*student, plan, *widths, *options, kept, kept[0], True, True, True)


def run_update(case: Case) -> None:
    """Of the rows of a model with 9 heads: 576 numbers where a head has 64, as in SmolLM2-135M."""
    table, first, second = (torch.empty(1000, 9 * case.head_dim, device="meta") for _ in range(3))
    updates, slots = (torch.empty(x, dtype=torch.int64, device="meta") for x in (1000, 100))
    body(ops.update_rows)(table, first, second, updates, slots, table[:100], 1e-3, 0.9, 0.999, 1e-8)


def run_plan() -> None:
    """Of ids on a GPU: with documents, which have more to do. It has no head dimension."""
    ids = [torch.empty(2, n, dtype=torch.int64, device="meta") for n in LENGTHS]
    options = {"variant": "aim", "causal": True, "sliding_window": 64, "reduction": "documents"}
    make_device_plan(*ids, *ids, widths=(32, 32), **options)


def body(op):
    """The function of a custom op: the op itself would not run it on meta tensors."""
    return op._init_fn


def make_job(case: Case, target: str, label: str, kernel: JITFunction, args, kwargs) -> Job:
    """Specialised by Triton's own rules: 16-byte alignment, ones and None as constants."""
    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    _, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    constants = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
    return Job(
        kernel.__module__, kernel.__name__, target, **asdict(case), loss=label, signature=signature,
        constants=constants, attributes=attributes, options=options,
    )  # fmt: skip


# Compiling one kernel


def compile_row(job: Job) -> dict:
    """The row of one kernel, from the cache where it is there."""
    cached = CACHE / f"{job.key()}.json"
    if cached.exists():
        return json.loads(cached.read_text())
    row = describe(job) | measure(job)
    CACHE.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(row))
    partial.replace(cached)
    return row


def describe(job: Job) -> dict:
    """What a row is about; `name` is the same before and after a change of tile shapes."""
    tiles = {x: y for x, y in job.constants.items() if x.startswith("BLOCK_")}
    about = {"name": job.name, "kernel": job.kernel.removesuffix("_kernel"), "variant": job.variant}
    about |= {"dtype": job.dtype, "head_dim": job.head_dim, "target": job.target}
    return about | {"tiles": tiles, "warps": job.options["num_warps"], "stages": job.options["num_stages"]}


def measure(job: Job) -> dict:
    """Compiles in a folder of its own, always: what ptxas says is not in Triton's cache."""
    source = ASTSource(kernel_of(job), job.signature, job.constants, job.attributes)
    knobs, log = triton.knobs, io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        compiled = triton.compile(source, target=gpu_target(job.target), options=job.options)
        asm, metadata = compiled.asm, compiled.metadata
    found = {"shared": metadata.shared, "tensor_columns": getattr(metadata, "tmem_size", 0) or 0}
    if job.target.startswith("gfx"):
        found |= parse_amdgcn(asm["amdgcn"])
    else:
        found |= parse_ptxas(log.getvalue()) | parse_sass(disassemble(asm["cubin"]))
    found |= count_products(asm["ttir"], asm["ttgir"])
    return found | {"occupancy": occupancy(found, job.options["num_warps"], job.target)}


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.knobs.nvidia.ptxas.path).with_name("nvdisasm")
        return subprocess.check_output([tool, "-c", file.name], text=True, stderr=subprocess.DEVNULL)


# Comparing and writing


def faults(row: dict) -> list[str]:
    """What must never be, whatever was measured before."""
    found = []
    limit = CARDS[row["target"]].block_shared
    if row["shared"] > limit:
        found.append(f"shared memory {row['shared']} above {limit}")
    if spills_often(row) and row["dtype"] == "bfloat16" and str(row["head_dim"]) in CLEAN:
        found.append(f"spills {spilled(row)} bytes")
    return found


def spills_often(row: dict) -> bool:
    """In the main loop; anywhere if there is none. What is spilled around it costs nothing that one would see."""
    return bool(row["loop"]["spills"] if row["loop"] else spilled(row))


def spilled(row: dict) -> int:
    return row["spill_stores"] + row["spill_loads"]


def worse(row: dict, before: dict | None) -> list[str]:
    """Why a row fails the check against the committed one of its name."""
    found = faults(row)
    if before is None:
        return [*found, "not in kernels.json: run make kernel-report"]
    if spilled(row) > spilled(before):
        found.append(f"spills {spilled(row)} bytes, before {spilled(before)}")
    missing, missed = (x["products"] - x["tensor_products"] for x in (row, before))
    if missing > missed:
        found.append(f"{missing} products off tensor cores, before {missed}")
    return found


def compare(rows: list[dict], committed: list[dict]) -> list[str]:
    """One line for each row that got worse."""
    before = {x["name"]: x for x in committed}
    reasons = ((x["name"], worse(x, before.get(x["name"]))) for x in rows)
    return [f"{name}: {', '.join(found)}" for name, found in reasons if found]


COLUMNS = ("kernel", "tile", "warps, stages", "registers", "blocks", "spills (in the loop)", "tensor cores", "on them")
COLUMNS += ("instructions", "shared", "by tensor cores", "ahead")


def cells(row: dict) -> list[str]:
    loop = row["loop"] or {}
    spills = f"{spilled(row)} ({'-' if not loop else loop['spills']})" if spilled(row) else "-"
    turn = [f"{loop[x]:.0f}" if loop else "-" for x in ("instructions", "shared_bytes", "tensor_bytes", "copies")]
    return [
        f"{row['kernel']} {row['variant']}".strip(),
        "x".join(str(y) for x, y in row["tiles"].items() if x in ("BLOCK_M", "BLOCK_N", "BLOCK_T", "BLOCK_S")),
        f"{row['warps']}, {row['stages']}",
        str(row["registers"]),
        str(round(row["occupancy"] * CARDS[row["target"]].warps / row["warps"])),
        spills,
        " ".join(f"{y} {x}" for x, y in row["tensor"].items() if y) or "-",
        f"{row['tensor_products']}/{row['products']}",
        *turn,
    ]


def render(rows: list[dict], command: str) -> str:
    """KERNELS.md: a line for each dtype, head dimension and target, and the kernels with a main loop."""
    about = [
        "# What the kernels compile to",
        "",
        f"`{command}`, Triton {triton.__version__}, commit {commit()}. **Nothing here ran on a GPU**: compiled code",
        "was read. kernels.json has every kernel. Spills are bytes per thread; blocks are those that registers and",
        "shared memory allow on a multiprocessor; `on them`: products (`tl.dot`) on tensor cores, of all. Of a turn of",
        "the main loop: instructions of a warp, bytes that it moves to and from shared memory and that tensor cores",
        "read there, and copies into shared memory that nothing waits for (none: loads are not ahead of their use).",
        "",
        f"{len(rows)} kernels, {len([x for x in rows if spilled(x)])} with spills, "
        f"{sum(spills_often(x) for x in rows)} of them in the main loop, "
        f"{sum(bool(faults(x)) for x in rows)} that fail `--check`.",
        "",
        *_table(SUMMARY, [summary(title, [x for x in rows if _title(x) == title]) for title in _titles(rows)]),
    ]
    for title in _titles(rows):
        mine = [cells(x) for x in rows if _title(x) == title and (x["loop"] or spilled(x))]
        about += ["", f"## {title}", "", *_table(COLUMNS, mine)] if mine else []
    return "\n".join(about) + "\n"


SUMMARY = ("target, dtype, head dimension", "kernels", "most registers", "spill", "in the loop", "off tensor cores")
SUMMARY += ("most shared KiB",)


def summary(title: str, rows: list[dict]) -> list[str]:
    missing = sum(x["products"] - x["tensor_products"] for x in rows)
    numbers = (
        max(x["registers"] for x in rows),
        sum(map(bool, map(spilled, rows))),
        sum(map(spills_often, rows)),
        missing,
    )
    limit = CARDS[rows[0]["target"]].block_shared // KIB
    return [title, str(len(rows)), *map(str, numbers), f"{max(x['shared'] for x in rows) / KIB:.0f} of {limit}"]


def _table(head: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(x) + " |" for x in (head, ["---"] * len(head), *lines)]


def _titles(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(map(_title, rows)))


def _title(row: dict) -> str:
    return f"{row['target']}, {row['dtype']}, {row['head_dim']}"


def commit() -> str:
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=HERE)
    return answer.stdout.strip() or "unknown"


# Command


def compile_all(jobs: list[Job], processes: int) -> list[dict]:
    """Rows in the order of the jobs; processes start only for what is not cached."""
    rows = {x.name: compile_row(x) for x in jobs if (CACHE / f"{x.key()}.json").exists()}
    left = [x for x in jobs if x.name not in rows]
    if left:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, end_with_parent) as pool, Progress() as progress:
            task = progress.add_task("compiling", total=len(left))
            # The slow ones first: float32 splits each product into three.
            order = sorted(left, key=lambda x: (x.dtype, x.head_dim), reverse=True)
            futures = {pool.submit(compile_row, x): x for x in order}
            for future in as_completed(futures):
                try:
                    rows[futures[future].name] = future.result()
                except Exception as error:
                    raise RuntimeError(f"{futures[future].name} does not compile") from error
                progress.advance(task)
    return [rows[x.name] for x in jobs]


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(
    check: Annotated[bool, typer.Option(help="Compare with kernels.json instead of writing it.")] = False,
    subset: Annotated[bool, typer.Option(help="What the tests compile: four sizes and targets.")] = False,
    everything: Annotated[bool, typer.Option(help="Every dtype, head dimension and target.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes that compile.")] = os.cpu_count() or 1,
    out: Annotated[Path, typer.Option(help="The table; kernels.json lies beside it.")] = HERE / "KERNELS.md",
) -> None:
    """Compile all kernels for all targets and say what came out."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    rows = compile_all(
        [job for pair in (SUBSET if subset else ALL if everything else TABLES) for job in record_launches(*pair)], jobs
    )
    data = out.with_name("kernels.json")
    if check:
        found = compare(rows, json.loads(data.read_text()))
        print("\n".join(found) if found else f"{len(rows)} kernels compiled, none worse than {data.name}")
        sys.exit(bool(found))
    command = "python benchmarks/kernel_report.py" + " --subset" * subset + " --everything" * everything
    out.write_text(render(rows, command))
    data.write_text("[\n" + ",\n".join(json.dumps({y: x[y] for y in COMMITTED}) for x in rows) + "\n]\n")
    print(f"{len(rows)} kernels, {sum(bool(spilled(x)) for x in rows)} with spills: {out}")


if __name__ == "__main__":
    typer.run(main)
