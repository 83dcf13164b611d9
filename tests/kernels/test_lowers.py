"""Every kernel lowers for its platform, from a host without one: interpret mode takes more than
Triton and Mosaic do. Small shapes of the real launches, in the jax that runs the test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _call, encode, hadamard, logits_only, probe_scores
from pallas_kernels.ahead.lowering import kernels, lower
from pallas_kernels.arg_specs import VARIED, spec
from pallas_kernels.packed_decode import packed_decode
from pallas_kernels.packed_decode.config import Config
from pallas_kernels.packed_decode.tpu import packed_decode_tpu

CONFIGS = {
    "uniform-8": Config(splits=3, tokens=512, warps=1),
    "kivi-2": Config(channels=64, warps=4),
}
PAIRED = ("uniform-8", "kivi-2", "kivi-2-grouped", "turboquant-prod-3", "tiers-4-2")
ON_GPU = (*(spec(pair) for pair in PAIRED), *VARIED)
ON_TPU = tuple(
    spec(pair, **more)
    for pair, more in {
        "bf16": {},
        "lloyd-max-3": {"paged": True},
        "kivi-2": {"group": 16},
        "turboquant-prod-3": {"head_dim": 64},
        "uniform-4": {"window": 4096},
    }.items()
)


def small(spec):
    """The launch with two heads of 512 tokens: the same program."""
    window = spec.window and spec.page
    return dataclasses.replace(spec, kv_heads=2, tokens=512, window=window)


def called(f, platform, *args):
    """Kernels that the lowered program calls, with products as precise as users have them."""
    with jax.default_matmul_precision("default"):
        return kernels(lower(f, platform, *args), platform)


@pytest.mark.parametrize("spec", ON_GPU, ids=lambda spec: spec.name)
def test_packed_decode(spec):
    tiny = small(spec)
    run = lambda a: packed_decode(**a, **tiny.options, config=CONFIGS.get(spec.name))
    assert called(run, "cuda", tiny.shapes()) == 1


@pytest.mark.parametrize("spec", ON_TPU, ids=lambda spec: spec.name)
def test_packed_decode_on_tpu(spec):
    tiny = dataclasses.replace(small(spec), transposed_values=False)
    run = lambda a: packed_decode_tpu(**a, **tiny.options)
    assert called(run, "tpu", tiny.shapes()) == 1


@pytest.mark.parametrize("name", ["lloyd-max-2", "kivi-2"])
def test_logits_only(name):
    tiny = small(spec(name))
    args = {k: v for k, v in tiny.shapes().items() if k in ("q", "key", "lengths")}
    assert called(lambda a: logits_only.logits_only(**a, page=tiny.page), "cuda", args) == 1


@pytest.mark.parametrize(("d", "dtype"), [(128, jnp.bfloat16), (256, jnp.float32)])
def test_hadamard(d, dtype):
    x = jax.ShapeDtypeStruct((64, d), dtype)
    signs = jax.ShapeDtypeStruct((d,), jnp.float32)
    assert called(hadamard.hadamard, "cuda", x, signs) == 1


LEVELS = encode.Levels(jnp.array([-1.5, -0.5, 0.5, 1.5]), 2)


@pytest.mark.parametrize(
    ("form", "transform", "transposed"),
    [
        (LEVELS, encode.Walsh(jnp.ones(128)), False),
        (LEVELS, encode.Dense(jnp.eye(128)), True),
        (encode.Grid(bits=4, group=32), None, True),
    ],
    ids=["levels", "dense", "groups"],
)
def test_encode(form, transform, transposed):
    x = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)
    run = functools.partial(encode.encode, form=form, transform=transform, transposed=transposed)
    assert called(run, "cuda", x) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_probe_scores(causal):
    shape = jax.ShapeDtypeStruct
    q, key = shape((1, 2, 4, 32, 128), jnp.float32), shape((1, 2, 512, 128), jnp.bfloat16)
    more = {"positions": shape((1, 512), jnp.int32), "query_positions": shape((1, 32), jnp.int32)}
    run = lambda q, key, more: probe_scores.probe_scores(q, key, **more)
    assert called(run, "cuda", q, key, more if causal else {}) >= 1


def test_what_triton_does_not_take_is_found():
    """A tile of 96 rows: interpreted without a word, refused here."""

    def body(x, y):
        y[...] = x[...] * 2

    x = jax.ShapeDtypeStruct((96, 128), jnp.float32)
    double = lambda backend: (
        lambda x: _call.call(body, x, name="double", grid=(1,), out_shape=x, backend=backend)
    )
    jax.eval_shape(double("interpret"), x)
    with pytest.raises(ValueError, match="power of 2"):
        called(double("triton"), "cuda", x)
