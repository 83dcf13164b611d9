"""`packed_decode` without Pallas: what the Triton source is told, and, where triton is installed,
the source itself: its numbers in Triton's interpreter, and PTX for a GPU that is not there."""

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packs import block

import kvjax
from kvjax.attention.packed_kernel import backend
from kvjax.core.errors import InputError
from pallas_kernels import arg_specs
from pallas_kernels.bench.check import check
from pallas_kernels.packed import Part
from pallas_kernels.packed_decode import packed_decode, triton_backend, triton_form
from pallas_kernels.packed_decode.config import Config
from pallas_kernels.packed_decode.kernel import why_not
from pallas_kernels.packed_decode.operands import chunks, prepare_queries, prepare_values
from pallas_kernels.packed_decode.read import Plan
from pallas_kernels.packed_decode.triton_tables import describe

HERE = Path(__file__).parent
SOURCE = Path(triton_backend.__file__).with_name("triton_source.py")


def small(pair, **changes):
    return arg_specs.spec(pair, **{"kv_heads": 2, "tokens": 512, **changes})


def decode(spec):
    run = functools.partial(packed_decode, **spec.options, backend="jax_triton")
    return lambda args: run(**args)


@pytest.mark.parametrize("name", ["triton", "jax_triton"])
def test_what_is_not_installed_is_said_in_one_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "triton", sys)  # as if it were there
    monkeypatch.setitem(sys.modules, name, None)
    says = rf"got.* no {name} \(.*\); expected triton and jax_triton; pip install 'kvjax\[gpu,triton\]'"
    spec = small("uniform-2")
    with pytest.raises(ValueError, match=says) as error:
        jax.eval_shape(decode(spec), spec.shapes())
    assert "\n" not in str(error.value)
    method = kvjax.methods.get("turboquant-2", head_dim=64)
    with pytest.raises(InputError, match=says):
        backend(method.with_attention("jax_triton"))


def test_a_method_may_ask_for_it(monkeypatch):
    monkeypatch.setattr(triton_backend, "why_absent", lambda: None)
    method = kvjax.methods.get("turboquant-2", head_dim=64).with_attention("jax_triton")
    assert backend(method) == "jax_triton"
    with pytest.raises(InputError, match="8 products per value"):
        backend(kvjax.methods.get("turboquant-4", head_dim=64).with_attention("jax_triton"))


def test_what_it_does_not_take_is_said_before_launch():
    spec = small("kivi-2-grouped", head_dim=512)
    args = spec.shapes()
    assert why_not(args["q"], args["key"], args["value"], page=spec.page) is None
    with pytest.raises(ValueError, match=r"got \d+ arrays; expected 48 or fewer; use fewer tiers"):
        jax.eval_shape(decode(spec), args)


def test_the_signature_has_room_for_the_arrays():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    kernel = functions["packed_decode_kernel"]
    names = [f"a{i:02d}" for i in range(triton_form.ARRAYS)]
    assert [a.arg for a in kernel.args.args] == [*names, "out", "lse", "FORM"]
    listed = ast.unparse(kernel.body[1])
    assert listed == f"arrays = ({', '.join(names)})"


def form_of(key, value, q, page, config, unit_bits):
    plan = Plan(
        page=page,
        slots=2,
        unit_bits=unit_bits,
        together=1,
        layout="rows",
        splits=1,
        window=None,
        passes=config.passes,
        channels=config.channels,
        native=False,
    )
    zero = jnp.zeros(1, jnp.int32)
    args = {
        "layer": zero,
        "lengths": zero,
        "table": None,
        "starts": None,
        "position": None,
        "queries": prepare_queries(q, key, 8, config.channels),
        "weights": prepare_values(value),
        "key": key,
        "value": value,
    }
    return describe(args, plan, 8, -1e30)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "turned"])
def test_recipes_give_the_codes(bits, transposed):
    """Words read, shifted, xor-ed and masked as the tables say, times the weights of the terms: the
    values of a block, unit by unit, also where another block has narrower words."""
    rng, page, d = np.random.default_rng(bits), 128, 16
    lead = (1, 1, 1, 2)
    for levels in (False, True) if bits <= 4 else (False,):
        one, x = block(rng, lead, page, d, bits, levels, transposed, 0.0)
        part = (Part((one,)),)
        for unit_bits in {1, min(one.widths)}:
            q = jnp.zeros((1, 1, 1, d))
            form, arrays = form_of(part, part, q, page, Config(passes=1), unit_bits)
            b = form.blocks[form.parts[form.values[0]].blocks[0]]
            weights = np.asarray(arrays[b.weights], np.float64)
            for unit in range(16 // unit_bits):
                total = weights[-1]
                for term, recipe in enumerate(b.recipes[unit]):
                    words = masked(form, b, arrays, recipe)
                    operand = words.astype(np.uint16).view(np.float16).astype(np.float64)
                    scale = weights[term] * weights[-2] * b.sizes[unit] * form.unscale
                    total = total + operand * scale
                want = x[0, 0, 0, 1, unit * form.rows : (unit + 1) * form.rows]
                np.testing.assert_allclose(total, want, atol=1e-6)


def masked(form, b, arrays, recipe):
    """Words of the second page of a unit, `[rows, channels]`, as the kernel addresses them. On a GPU
    two lie in a register, and bits of one are shifted into the other: to be masked again."""
    outs = []
    for neighbour in (0, 0xFFFF):
        out = 0
        for plane, stretch, right in zip(
            recipe.planes, recipe.stretches, recipe.rights, strict=True
        ):
            w = b.words[plane]
            row = stretch * form.rows + np.arange(form.rows)[:, None]
            at = w.page + row * w.row + np.arange(16) * w.channel
            words = np.asarray(arrays[w.array]).reshape(-1)[at].astype(np.int64)
            above, below = words | neighbour << 16, words << 16 | neighbour
            out = out ^ (above >> right if right >= 0 else below << -right >> 16)
        outs.append(out & recipe.mask)
    np.testing.assert_array_equal(*outs)
    return outs[0]


def test_units_come_in_the_order_of_words_and_go_back():
    """Of 8-bit keys beside 2-bit values, in two passes."""
    spec = small("uniform-8", page=256)
    args = spec.arrays(np.random.default_rng(0))
    value = small("uniform-2").arrays(np.random.default_rng(0))["value"]
    form, _ = form_of(args["key"], value, args["q"], 256, Config(passes=2, channels=32), 2)
    assert form.passes == ((0, 2, 4, 6), (1, 3, 5, 7))
    wide = form.blocks[form.parts[form.keys[0]].blocks[0]]
    assert wide.orders[0] == (0, 4, 2, 6)  # units 0 and 4 lie in the same words
    for units, order, places, turns in zip(
        form.passes, wide.orders, wide.places, wide.turns, strict=True
    ):
        assert tuple(order[place] for place in places) == units
        assert tuple(units[turn] for turn in turns) == order
    assert [form.cuts[c].out for c in form.parts[form.values[0]].cuts] == [0, 32, 64, 96]
    assert form.out_rows == sum(c.size for b in value[0].blocks for c in chunks(b, 32))


def test_forms_are_told_apart_by_their_names():
    """Triton names what it compiles by them, and takes equal names for equal code."""
    forms = []
    for page in (128, 256):
        args = small("lloyd-max-2", page=page).arrays(np.random.default_rng(0))
        make = functools.partial(form_of, args["key"], args["value"], args["q"], page)
        forms += [make(Config(), 2)[0], make(Config(passes=2), 2)[0]]
    assert len({repr(form) for form in forms}) == 4
    assert all(re.fullmatch(r"form[0-9a-f]{16}", repr(form)) for form in forms)
    assert len({hash(form) for form in forms}) == 4


def test_an_array_that_is_met_again_is_passed_once():
    """Values with a scale per 32 channels: four parts of the same words."""
    args = small("kivi-2-grouped").arrays(np.random.default_rng(0))
    _, arrays = form_of(args["key"], args["value"], args["q"], 256, Config(), 2)
    assert len(arrays) == len({id(a) for a in arrays}) < triton_form.ARRAYS


# What needs triton.

CASES = {
    "uniform-2": 1e-3,
    "lloyd-max-2": 1e-3,
    "lloyd-max-3": 1e-3,
    "uniform-3": 1e-3,
    "uniform-4": 1e-3,
    "uniform-8": 2e-3,
    "kivi": 1e-3,
    "tiers": 1e-3,
    "bf16": 1e-2,
    "table": 1e-3,
    "empty": 1e-3,
    "all-masked": 0.0,
    "window-table": 1e-3,
    "splits-3": 1e-3,
    "passes": 1e-3,
    "cuts": 1e-3,
    "small-pages": 1e-3,
    "odd-pages": 1e-3,
    "method turboquant-prod-3": 2e-3,
    "method kivi-2": 2e-3,
    "method tiers": 2e-3,
}


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "triton_interpreted.py"), *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["case"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_is_attention(interpreted, case):
    """To the rounding of operands: to 11 bits of codes' queries and weights, 8 of bf16's."""
    assert interpreted[case]["out"] <= CASES[case]
    assert interpreted[case]["lse"] <= 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["uniform-2", "bf16"])
def test_compiles_for_a_gpu_that_is_not_there(monkeypatch, pair):
    """Down to PTX, in which the products are those of matrix units."""
    for name in ("triton", "jax_triton"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}")
    if reason := triton_backend.why_absent():
        pytest.skip(reason)
    plain = triton_backend.call
    monkeypatch.setattr(triton_backend, "call", functools.partial(plain, compute_capability=90))
    spec = small(pair)
    text = jax.jit(decode(spec)).trace(spec.shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call(") == 1


@pytest.mark.parametrize("pair", ["uniform-2", "lloyd-max-2", "kivi-2", "tiers-4-2", "bf16"])
def test_on_a_gpu(pair):
    if jax.default_backend() not in ("gpu", "cuda"):
        pytest.skip("no GPU (or JAX_PLATFORMS=cpu)")
    if reason := triton_backend.why_absent():
        pytest.skip(reason)
    assert check(small(pair, batch=2, tokens=1024), "jax_triton").reason is None
