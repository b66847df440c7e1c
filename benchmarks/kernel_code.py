"""Compiled kernels read: registers, spills, tensor cores, the main loop, occupancy."""

import re
from collections import Counter
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Card:
    """The smallest one of an architecture: what a block and a multiprocessor have."""

    block_shared: int
    shared: int
    warps: int
    blocks: int


CARDS = {
    "sm_80": Card(163 * KIB, 164 * KIB, 64, 32),
    "sm_86": Card(99 * KIB, 100 * KIB, 48, 16),
    "sm_89": Card(99 * KIB, 100 * KIB, 48, 24),
    "sm_90": Card(227 * KIB, 228 * KIB, 64, 32),
    "sm_100": Card(227 * KIB, 228 * KIB, 64, 32),
    "sm_120": Card(99 * KIB, 100 * KIB, 48, 24),
    "gfx942": Card(64 * KIB, 64 * KIB, 32, 32),
}
NVIDIA_REGISTERS, NVIDIA_TENSOR_COLUMNS = 65536, 512
AMD_REGISTERS, AMD_SIMDS, AMD_MOST_WAVES = 512, 4, 8


def parse_ptxas(log: str) -> dict:
    """Registers, stack and spills (bytes per thread) of the one kernel in the output of `ptxas -v`."""
    stack, stores, loads = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )[-1]
    registers = re.findall(r"Used (\d+) registers", log)[-1]
    numbers = {"registers": registers, "stack": stack, "spill_stores": stores, "spill_loads": loads}
    return {x: int(y) for x, y in numbers.items()}


def parse_sass(text: str) -> dict:
    """Tensor-core instructions by kind and 16-byte loads among global ones, from nvdisasm."""
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    kinds = Counter(x.split(".")[0] for x in names)
    tensor = {x: y for x, y in sorted(kinds.items()) if re.fullmatch(r"HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA|DMMA", x)}
    loads = [x for x in names if x.split(".")[0] in ("LDG", "LDGSTS")]
    return {"tensor": tensor, "wide_loads": sum(".128" in x for x in loads), "loads": len(loads), "loop": loop_of(text)}


def loop_of(text: str) -> dict | None:
    """What a warp does in one turn of the main loop: instructions; bytes that they move to and from shared memory, and
    that tensor cores read there themselves; copies from global to shared memory that nothing waits for; spills.

    The main loop is the shortest of those with exponentials and the most tensor-core instructions: kernels have a
    second one, with masks, for the edges of what rows see, and softmax has one with fewer products for the teacher.
    Loops around others do not count.
    """
    places, instructions = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            places[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            instructions.append(found.groups())
    jumps = [
        (places[target[0]], place)
        for place, (name, rest) in enumerate(instructions)
        if name.startswith("BRA")
        and (target := re.search(r"\.L\w+", rest))
        and places.get(target[0], place + 1) <= place
    ]
    products = {}
    for start, stop in jumps:
        inside = instructions[start : stop + 1]
        names = [x for x, _ in inside]
        # A way back from code that was put behind the end is no loop.
        if (count := sum("MMA" in x for x in names)) and "MUFU.EX2" in names and "EXIT" not in names:
            products[start, stop] = count, inside
    inner = [
        found
        for place, found in products.items()
        if not any(place != x and place[0] <= x[0] and x[1] <= place[1] for x in products)
    ]
    if not inner:
        return None
    most = max(count for count, _ in inner)
    body = min((inside for count, inside in inner if count == most), key=len)
    names = [name for name, _ in body]
    return {
        "instructions": len(body),
        "shared_bytes": sum(map(_shared_bytes, names)),
        "tensor_bytes": sum(_tensor_bytes(*x) for x in body),
        "copies": sum(x.startswith(("LDGSTS", "UTMALDG")) for x in names),
        "spills": sum(x.startswith(("LDL", "STL")) for x in names),
    }


def _shared_bytes(name: str) -> int:
    """Of one instruction of a warp."""
    kind, *flags = name.split(".")
    if kind == "LDSM":
        return 128 * int(next((x for x in flags if x in ("2", "4")), 1))
    if kind in ("LDS", "STS"):
        return 32 * int(next((x for x in flags if x in ("64", "128")), 32)) // 8
    return 0


def _tensor_bytes(name: str, operands: str) -> float:
    """What a product of Hopper's four warps reads from shared memory, for one of them: the right operand, and the left
    one where that is no register."""
    shape = re.match(r"HGMMA\.64x(\d+)x(\d+)", name)
    if not shape:
        return 0
    columns, depth = map(int, shape.groups())
    left = 64 * operands.split(",")[1].strip().startswith("gdesc")
    return (left + columns) * depth * (4 if "TF32" in name else 2) / 4


def parse_amdgcn(text: str) -> dict:
    """The same of AMD's assembly; bytes per lane, registers those of vectors and accumulators together."""
    numbers = {x: int(y) for x, y in re.findall(r"^\s*\.(\w+_count|private_segment_fixed_size):\s+(\d+)", text, re.M)}
    names = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    loads = [x for x in names if re.match(r"(global|buffer|flat)_load", x)]
    return {
        "registers": numbers["vgpr_count"],
        "stack": numbers["private_segment_fixed_size"],
        "spill_stores": sum(_scratch_bytes(x) for x in names if x.startswith("scratch_store")),
        "spill_loads": sum(_scratch_bytes(x) for x in names if x.startswith("scratch_load")),
        "vector_spills": numbers["vgpr_spill_count"],
        "scalar_spills": numbers["sgpr_spill_count"],
        "tensor": {"MFMA": sum(x.startswith("v_mfma") for x in names)},
        "wide_loads": sum(x.endswith("dwordx4") for x in loads),
        "loads": len(loads),
        "loop": None,
    }


def _scratch_bytes(instruction: str) -> int:
    words = re.search(r"dwordx(\d)", instruction)
    return 4 * int(words[1]) if words else 4


def count_products(ttir: str, ttgir: str) -> dict:
    """Products written in the kernel, and those that did not stay in a layout of plain multiply-adds."""
    written = len(re.findall(r"\btt\.dot\b", ttir))
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(\w+)", ttgir, re.MULTILINE))
    results = re.findall(r"\btt\.dot\b.*-> tensor<[^#]*(#\w+)>", ttgir)
    plain = sum(layouts.get(x) not in ("nvidia_mma", "amd_mfma", "amd_wmma") for x in results)
    return {"products": written, "tensor_products": written - min(plain, written)}


def occupancy(found: dict, warps: int, target: str) -> float:
    """Warps per multiprocessor of the most that it holds, as registers, shared and tensor memory allow."""
    card = CARDS[target]
    if target.startswith("gfx"):
        waves = min(AMD_MOST_WAVES, AMD_REGISTERS // _round_up(max(found["registers"], 1), 8))
        blocks = min(card.blocks, waves * AMD_SIMDS // warps)
        reserved = 0
    else:
        per_warp = _round_up(max(found["registers"], 1) * 32, 256)
        blocks = min(card.blocks, card.warps // warps, NVIDIA_REGISTERS // per_warp // warps)
        reserved = KIB
    if found["tensor_columns"]:
        blocks = min(blocks, NVIDIA_TENSOR_COLUMNS // found["tensor_columns"])
    if found["shared"] + reserved:
        blocks = min(blocks, card.shared // (found["shared"] + reserved))
    return round(blocks * warps / card.warps, 3)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
