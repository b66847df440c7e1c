"""No kernel may compile to worse than benchmarks/kernels.json says, and the report reads compiled code right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
kernel_report = pytest.importorskip("kernel_report", reason="needs Triton")
import kernel_code  # noqa: E402

ROW = {
    "name": "aim_rows mse bfloat16 d=64 sm_80", "kernel": "aim_rows", "variant": "mse", "dtype": "bfloat16",
    "head_dim": 64, "target": "sm_80", "tiles": {"BLOCK_M": 64, "BLOCK_T": 32}, "warps": 4, "stages": 2,
    "shared": 16384, "tensor_columns": 0, "registers": 128, "stack": 0, "spill_stores": 0, "spill_loads": 0,
    "tensor": {"HMMA": 8}, "wide_loads": 3, "loads": 4, "products": 2, "tensor_products": 2, "occupancy": 0.25,
    "loop": {"instructions": 100, "shared_bytes": 512, "tensor_bytes": 256.0, "copies": 4, "spills": 0},
}  # fmt: skip

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'aim_rows_kernel' for 'sm_80'
ptxas info    : Function properties for aim_rows_kernel
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 480 bytes cmem[0]
"""

SASS = """
.text.aim_rows_kernel:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0020*/                   LDG.E R5, [R2.64] ;
        /*0030*/              @P1  LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64], !P0 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   HMMA.1688.F32.TF32 R8, R4, R6, R8 ;
        /*0060*/                   HGMMA.64x32x16.F32 R24, gdesc[UR4], R24 ;
        /*0070*/             @UP0  UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4] ;
        /*0080*/                   BRA `(.L_x_0) ;
"""

AMDGCN = """
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_dword v5, v6, s[4:7], 0 offen
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\tscratch_store_dwordx4 off, v[0:3], off
\tscratch_load_dword v1, off, off
    .agpr_count:     4
    .private_segment_fixed_size: 20
    .sgpr_count:     40
    .sgpr_spill_count: 2
    .vgpr_count:     264
    .vgpr_spill_count: 4
"""

TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [4, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
  %3 = tt.dot %0, %1, %2 : tensor<64x64xbf16, #ttg.dot_op<{parent = #mma}>> * y -> tensor<64x32xf32, #mma>
  %6 = tt.dot %4, %5, %3, inputPrecision = tf32 : x * y -> tensor<64x32xf32, #blocked> loc(#l)
"""


def test_ptxas():
    assert kernel_code.parse_ptxas(PTXAS) == {"registers": 255, "stack": 24, "spill_stores": 20, "spill_loads": 16}


def test_sass():
    found = kernel_code.parse_sass(SASS)
    assert found == {"tensor": {"HGMMA": 1, "HMMA": 2, "UTCHMMA": 1}, "wide_loads": 2, "loads": 3, "loop": None}


LOOPS = """
.L_x_0:
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0020*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/                   LDSM.16.MT88.2 R4, [R2] ;
        /*0060*/                   STS.64 [R2], R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00b0*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*00c0*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*00d0*/                   EXIT ;
"""


TURN = {"instructions": 5, "shared_bytes": 256 + 256, "tensor_bytes": 0, "copies": 0, "spills": 0}


def test_main_loop():
    """Of two loops with tensor cores and exponentials the shorter one; jumps forward are none."""
    longer = LOOPS.replace(
        "ISETP.GE.AND P0, PT, R2, R3, PT ;", "ISETP.GE.AND P0, PT, R2, R3, PT ;\n        /*0021*/    LDS R4, [R2] ;"
    )
    for text in (longer, longer.replace(".L_x_0", ".L_x_9")):
        assert kernel_code.loop_of(text) == TURN
    assert kernel_code.loop_of(LOOPS.replace("MUFU.EX2", "MUFU.RCP")) is None
    behind = LOOPS + "        /*00e0*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;\n" * 2
    assert kernel_code.loop_of(behind + "        /*00f0*/                   BRA `(.L_x_1) ;\n") == TURN


def test_what_a_turn_reads_ahead_spills_and_feeds():
    """Hopper's products read the right operand from shared memory, and the left one where it is no register."""
    lines = {
        "ISETP.GE.AND P0, PT, R2, R3, PT ;": "LDGSTS.E.BYPASS.128 [R9], desc[UR8][R2.64] ;",
        "LDSM.16.M88.4 R4, [R2] ;": "LDL R4, [R1] ;",
        "HMMA.16816.F32.BF16 R8, R4, R6, R8 ;": "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;\n"
        "        /*0011*/                   HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0 ;",
    }
    text = LOOPS.replace(".L_x_1", ".L_x_9")
    for old, new in lines.items():
        text = text.replace(old, new, 1)
    turn = {"instructions": 6, "shared_bytes": 0, "tensor_bytes": (96 + 128) * 16 * 2 / 4, "copies": 1, "spills": 1}
    assert kernel_code.loop_of(text) == turn


def test_amdgcn():
    found = kernel_code.parse_amdgcn(AMDGCN)
    assert (found["registers"], found["stack"], found["spill_stores"], found["spill_loads"]) == (264, 20, 16, 4)
    assert (found["vector_spills"], found["scalar_spills"], found["tensor"]) == (4, 2, {"MFMA": 1})
    assert (found["wide_loads"], found["loads"]) == (1, 2)


def test_products():
    written = "%3 = tt.dot %0, %1, %2 : x\n%6 = tt.dot %4, %5, %3 : x\ntt.dot_scaled_is_another"
    assert kernel_code.count_products(written, TTGIR) == {"products": 2, "tensor_products": 1}


@pytest.mark.parametrize(
    ("target", "registers", "shared", "columns", "warps", "expected"),
    [
        ("sm_80", 32, 0, 0, 4, 1.0),
        ("sm_80", 255, 0, 0, 4, 8 / 64),  # 8 warps of 256 registers
        ("sm_80", 129, 0, 0, 4, 12 / 64),  # in steps of 8 registers: 136, 15 warps, 3 blocks
        ("sm_86", 64, 40 * 1024, 0, 4, 8 / 48),  # shared memory for 2 blocks
        ("sm_100", 32, 0, 256, 4, 8 / 64),  # tensor memory for 2 blocks
        ("gfx942", 128, 0, 0, 4, 16 / 32),  # 4 waves on each of 4 units
        ("gfx942", 32, 32 * 1024, 0, 4, 8 / 32),
    ],
)
def test_occupancy(target, registers, shared, columns, warps, expected):
    found = {"registers": registers, "shared": shared, "tensor_columns": columns}
    assert kernel_code.occupancy(found, warps, target) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("before", "now", "word"),
    [
        ({"head_dim": 256}, {"head_dim": 256, "spill_stores": 8}, "spills 8 bytes, before 0"),
        ({"spill_loads": 8}, {"spill_loads": 8, "loop": ROW["loop"] | {"spills": 1}}, "spills 8 bytes"),  # never there
        ({"spill_loads": 8}, {"spill_loads": 8, "loop": None}, "spills 8 bytes"),
        ({}, {"shared": 164 * 1024}, "shared memory"),
        ({}, {"tensor_products": 1}, "1 products off tensor cores"),
        ({"name": "another"}, {}, "not in kernels.json"),
    ],
)
def test_worse(before, now, word):
    (line,) = kernel_report.compare([ROW | now], [ROW | before])
    assert line.startswith(ROW["name"])
    assert word in line


def test_not_worse():
    allowed = {"head_dim": 256, "spill_stores": 8, "registers": 255, "loop": ROW["loop"] | {"spills": 1}}
    assert not kernel_report.compare([ROW, ROW | allowed], [ROW | allowed])
    assert not kernel_report.compare([ROW | {"spill_stores": 8}], [ROW | {"spill_stores": 8}])  # around the loop
    assert not kernel_report.compare([ROW | {"registers": 255, "occupancy": 0.1}], [ROW])


def test_render():
    text = kernel_report.render([ROW, ROW | {"spill_stores": 8, "name": "spiller"}], "the command")
    assert "`the command`" in text
    assert "Nothing here ran on a GPU" in text
    assert "| sm_80, bfloat16, 64 | 2 | 128 | 1 | 0 | 0 | 16 of 163 |" in text
    assert "| aim_rows mse | 64x32 | 4, 2 | 128 | 4 | - | 8 HMMA | 2/2 | 100 | 512 | 256 | 4 |" in text
    assert "| aim_rows mse | 64x32 | 4, 2 | 128 | 4 | 8 (0) | 8 HMMA | 2/2 | 100 | 512 | 256 | 4 |" in text


def test_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(typer.BadParameter, match="TRITON_INTERPRET is set"):
        kernel_report.main(check=True, subset=True)


def test_kernels_are_not_worse():
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernel_report.py", "--check", "--subset"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_kernel_is_compiled_again_for_another_length():
    """What Triton would compile, by its own rules for specialisation, is the same from 1 token to 131,072."""
    program = """
import sys
sys.path.append("benchmarks")
import kernel_report
for case in (x for x in kernel_report.CASES if x.head_dim in (64, 80) and not x.softcap):
    found = []
    for kernel_report.LENGTHS in ((1, 1), (2, 3), (17, 16), (1000, 800), (4097, 4096), (131072, 100001)):
        jobs = kernel_report.record_launches(case, "sm_90")
        found.append(sorted(map(repr, jobs)))
        assert len(jobs) > 10
        assert found[-1] == found[0], [x for x in zip(*found[-2:]) if x[0] != x[1]]
"""
    environment = {x: y for x, y in os.environ.items() if x != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
