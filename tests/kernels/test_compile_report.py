"""Reading of listings and assembler reports, on small ones written by hand; what the command says."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels import compile_report
from pallas_kernels.ahead import bound, measure, ptxas, sass, step, table, wheels
from pallas_kernels.ahead.h200 import Kernel, launch
from pallas_kernels.arg_specs import KINDS, PAIRS, spec
from pallas_kernels.packed_decode import packed_decode
from pallas_kernels.packed_decode.config import Config

# Three loops: a short one, the main one with two products, and its masked twin, which is longer.
LISTING = """
\t.section\t.text.attend,"ax",@progbits
attend:
.text.attend:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/              @!P1 BRA `(.L_x_0) ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDG.E.128 R4, desc[UR12][R2.64] ;
        /*0050*/                   LOP3.LUT R8, R4, 0x30003, RZ, 0xc0, !PT ;
        /*0060*/                   HMMA.16816.F32 R12, R8, R10.reuse, R12 ;
        /*0070*/                   HMMA.16816.F32 R16, R8, R11, R16 ;
        /*0080*/                   NOP ;
        /*0090*/              @!P0 ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*00a0*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00b0*/                   LDG.E.128 R4, desc[UR12][R2.64] ;
        /*00c0*/                   LOP3.LUT R8, R4, 0x30003, RZ, 0xc0, !PT ;
        /*00d0*/                   SEL R8, R8, RZ, P2 ;
        /*00e0*/                   HMMA.16816.F32 R12, R8, R10.reuse, R12 ;
        /*00f0*/                   HMMA.16816.F32 R16, R8, R11, R16 ;
        /*0100*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0110*/                   FMNMX R9, R9, R8, !PT ;
        /*0120*/               @P0 BRA `(.L_x_2) ;
        /*0130*/                   EXIT ;
.L_x_3:
        /*0140*/                   BRA `(.L_x_3);
\t.section\t.text.other,"ax",@progbits
other:
        /*0000*/                   EXIT ;
"""

# As ptxas words it, of two kernels.
REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    96 bytes stack frame, 40 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""

PTX = ".visible .entry attend(\n\t.param .u64 attend_param_0\n)\n.reqntid 128, 1, 1\n{\n\tret;\n}\n"


def test_loops_are_branches_backward():
    attend = sass.functions(LISTING)["attend"]
    sizes = [len(loop.opcodes) for loop in sass.loops(attend)]
    assert sizes == [2, 6, 8]  # not the branch to itself, behind the end


def test_the_main_loop_has_the_products_and_no_masks():
    loop = sass.main_loop(sass.functions(LISTING)["attend"])
    assert loop.products() == 2
    assert loop.histogram() == {"HMMA": 2, "LDG": 1, "LOP3": 1, "ISETP": 1, "BRA": 1}
    assert loop.half_rate() == 2


def test_products_are_counted_by_their_shapes():
    assert sass.main_loop(LISTING).multiplied() == 2 * 16 * 8 * 16
    others = sass.Loop(("HMMA.1688.F32.TF32", "HGMMA.64x16x16.F32.BF16"))
    assert others.multiplied() == 16 * 8 * 8 + 16 * 16 * 16


def test_a_loop_without_all_products_is_an_error():
    kernel = Kernel("attend", ptxas.read(REPORT)["other"], 528, 64, 0, LISTING)
    with pytest.raises(RuntimeError, match=r"got 0\.50 of the products"):
        measure.describe(spec("uniform-2"), kernel, tokens=8, columns=8)


def test_without_products_the_longest_loop_is_the_main_one():
    lines = [line for line in LISTING.splitlines() if "HMMA" not in line]
    assert len(sass.main_loop("\n".join(lines)).opcodes) == 6
    assert sass.main_loop("        /*0000*/   EXIT ;") is None


def test_functions_are_told_apart():
    assert sass.functions(LISTING)["other"].count("EXIT") == 1


def test_assembler_report():
    assert ptxas.read(REPORT) == {
        "attend": ptxas.Used(255, spill_stores=40, spill_loads=60, static_shared=1024),
        "other": ptxas.Used(12, 0, 0, 0),
    }
    assert ptxas.read(REPORT)["attend"].spilled == 100


def test_entry_of_ptx():
    assert ptxas.entry(PTX) == ("attend", 128)
    assert ptxas.entry("// nothing") is None


def test_launch_plan():
    plan = (
        "1:001: kCustomKernel attend_fusion grid: [9, 1, 1] threads: [8, 1, 1]  shared_memory: 0 bytes\n"
        "6:006: kCustomKernel [prev=005 (1)] attend grid: [1, 8, 4] threads: [64, 1, 1]  shared_memory: 512 bytes"
    )
    assert launch(plan, "attend") == (32, 512)
    assert launch(plan, "other") is None


def test_row_of_a_kernel():
    """Every number from the listing by hand: 6 instructions, 64 threads, 4 tokens of 128 + 128."""
    kernel = Kernel("attend", ptxas.read(REPORT)["attend"], 528, 64, 8192, LISTING)
    row = measure.describe(spec("uniform-2"), kernel, tokens=4, columns=8)
    assert row.lanes_per_value == 6 * 64 / (4 * 256)
    assert row.half_rate_per_value == 2 * 64 / (4 * 256)
    assert row.failures == ("spills 100 bytes",)
    assert row.resident_warps == 8  # 255 registers of 64 threads: 4 programs
    values = 2 * 8 * 131072 * 128
    times = row.projected
    np.testing.assert_allclose(times.memory, values * 2.25 / 8 / 4.3e12 * 1e6)
    np.testing.assert_allclose(
        times.issue, values * row.lanes_per_value / (132 * 128 * 1.755e9) * 1e6
    )
    np.testing.assert_allclose(times.products, values * 8 / (132 * 1024 * 1.755e9) * 1e6)
    assert times.longest == times.memory
    assert times.binds == "memory"
    text = "\n".join([table.heading(), table.line(row), table.note([row])])
    assert len(table.line(row)) == len(table.heading())
    assert "projected" in text
    assert "FAILED uniform-2: spills 100 bytes" in text


def test_budgets_are_of_plain_launches():
    assert measure.budget(spec("lloyd-max-3")) == 4.5
    assert measure.budget(spec("uniform-2", page=64)) is None
    assert measure.budget(spec("tiers-4-2")) is None


def test_occupancy_has_four_limits():
    assert bound.resident_warps(32, 1024, 0) == 64
    assert bound.resident_warps(255, 128, 0) == 8
    assert bound.resident_warps(32, 32, 0) == 32
    assert bound.resident_warps(32, 64, 100_000) == 4


@pytest.mark.parametrize("name", ["uniform-2", "tiers-4-2", "turboquant-prod-3"])
def test_tokens_of_an_iteration_are_counted_in_the_program(name):
    tiny = dataclasses.replace(spec(name), kv_heads=1, tokens=256, page=64)
    run = lambda a: packed_decode(**a, **tiny.options, config=Config(tokens=128, warps=1))
    assert measure.loop_tokens(run, tiny.shapes()) == 128


def test_products_of_a_token():
    args = spec("lloyd-max-3").shapes()
    assert step.elements_of_token(args["key"], args["value"]) == 2 * 128 * 4  # four odd subsets


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pool"])
@pytest.mark.parametrize("pair", PAIRS)
def test_shapes_are_those_of_the_arrays(pair, paged):
    small = {"batch": 2, "kv_heads": 1, "tokens": 128, "page": 64, "window": 64, "layers": 2}
    one = dataclasses.replace(spec(pair), paged=paged, **small)
    arrays = one.arrays(np.random.default_rng(0))
    kinds = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]
    assert jax.tree.structure(one.shapes()) == jax.tree.structure(arrays)
    assert kinds(one.shapes()) == kinds(arrays)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(arrays))


def test_random_scales_are_small_and_positive():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**16, 1000, np.uint16)
    for kind, low, high in (("half", 1 / 64, 1 / 32), ("norm", 1 / 64, 1 / 32)):
        dtype, kept, fixed = KINDS[kind]
        bits = words & np.uint16(kept) | np.uint16(fixed)
        x = bits.view(np.float16).astype(np.float32)
        if dtype == np.uint16:
            x = (bits.astype(np.uint32) << 16).view(np.float32)
        assert low <= x.min()
        assert x.max() < high


def test_bytes_of_a_step():
    """2 bits, and a scale and a zero point of 16 bits per token; shared words are counted once."""
    assert spec("uniform-2").bytes() == 2 * 8 * 131072 * (32 + 4)
    assert spec("uniform-2", layers=3).bytes() == spec("uniform-2").bytes()
    grouped = 8 * 131072 * (32 + 32 + 4 * 4) + 8 * 512 * 128 * 4
    assert spec("kivi-2-grouped").bytes() == grouped


def test_help_says_what_it_does():
    command = [sys.executable, "-m", "pallas_kernels.compile_report", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--only" in said
    assert "H200" in said


def test_skips_with_the_reason(tmp_path, capsys):
    assert compile_report.main(["--wheels", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "compiles: skipped: no jax-cuda13-plugin, jax-cuda13-pjrt, triton, libtpu"
    )


def test_what_is_missing_is_named(tmp_path):
    for brings in wheels.NEEDED.values():
        (tmp_path / brings).mkdir(parents=True)
    assert wheels.why_not(tmp_path) is None
    (tmp_path / wheels.NEEDED["libtpu"]).rmdir()
    assert wheels.why_not(tmp_path).startswith("no libtpu in")


def test_tools_that_are_missing_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no ptxas-blackwell" in ptxas.find(tmp_path)


def test_a_failed_installation_is_a_reason(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no route\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    assert wheels.install(tmp_path).endswith("ERROR: no route")


def test_versions_fit_the_jax_that_is_installed():
    assert f"jax-cuda13-pjrt=={jax.__version__}" in wheels.requirements()


def test_configurations_by_name():
    config = compile_report._config("warps=4,tokens=128", spec("uniform-2"))
    assert (config.warps, config.tokens) == (4, 128)
    with pytest.raises(ValueError, match="got 'warp=4'"):
        compile_report._config("warp=4", spec("uniform-2"))


def test_numbers_are_marked_as_projected():
    kernel = Kernel("attend", ptxas.read(REPORT)["other"], 528, 64, 0, LISTING)
    row = measure.describe(spec("uniform-2"), kernel, tokens=4, columns=8)
    written = json.loads(json.dumps(compile_report._numbers([row], [], "0")))
    assert "not measured" in written["projected"]
    assert written["h200"][0]["projected"]["memory"] == row.projected.memory
    assert row.failures == ()
