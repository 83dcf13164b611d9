"""Mistakes are told where they are made, in three parts: got, expected, what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kvjax
from kvjax import methods
from kvjax.codecs import (
    QJL,
    Centered,
    Codebook,
    Hadamard,
    Linear,
    Matrix,
    Normalized,
    Orthogonal,
    Outliers,
    Split,
    Uniform,
    lloyd_max,
    rotated,
)
from kvjax.core.errors import InputError, known

D, PAGE = 16, 16
LAYOUT = kvjax.Layout(sink=0, recent=16, page=PAGE)
INT4 = Uniform(4)


def rng() -> jax.Array:
    return jax.random.key(0)


def check(codec) -> None:
    kvjax.Method(codec, INT4, LAYOUT).check(D)
    kvjax.Method(INT4, codec, LAYOUT).check(D)


def check_both(codec) -> None:
    """A codec that is wrong on either side, or inside of another."""
    for outer in (lambda c: c, Normalized, lambda c: Linear(Hadamard.plain(D), c)):
        for make in (lambda c: (c, INT4), lambda c: (INT4, c)):
            with pytest.raises(InputError):
                kvjax.Method(*make(outer(codec)), LAYOUT).check(D)
    check(codec)


def empty(**options) -> kvjax.Cache:
    options = {"capacity": 64, "kv_heads": 2, "head_dim": D, "batch": 2, **options}
    return kvjax.init(kvjax.Method(INT4, INT4, LAYOUT), **options)


def append(*shape: int, dtype=jnp.float32, side: str = "k") -> None:
    good, bad = jnp.zeros((2, 2, D)), jnp.zeros(shape, dtype)
    k, v = (bad, good) if side == "k" else (good, bad)
    kvjax.append(kvjax.Method(INT4, INT4, LAYOUT), empty(), k, v)


def extend(q=(2, 3, 2, 1, D), k=(2, 3, 2, D), v=(2, 3, 2, D)) -> None:
    method = kvjax.Method(INT4, INT4, LAYOUT)
    jax.eval_shape(kvjax.extend, method, empty(), *(jnp.zeros(shape) for shape in (q, k, v)))


def attend(*shape: int) -> None:
    method = kvjax.Method(INT4, INT4, LAYOUT)
    jax.eval_shape(kvjax.attend, method, empty(), jnp.zeros(shape))


# What was done wrong -> what the message must say.
MISTAKES = {
    "layout negative sink": (lambda: kvjax.Layout(sink=-1), "sink -1"),
    "layout negative recent": (lambda: kvjax.Layout(recent=-64), "recent -64"),
    "layout no page": (lambda: kvjax.Layout(page=0), "page 0"),
    "layout encodes none": (lambda: kvjax.Layout(encode_batch=0), "encode_batch 0"),
    "layout recent": (lambda: kvjax.Layout(recent=100, page=64), "100 with pages of 64.*use 128"),
    "uniform no bits": (lambda: Uniform(0), "bits: got 0; expected a whole number, 1 to 8"),
    "uniform many bits": (lambda: Uniform(9), "bits: got 9; expected a whole number, 1 to 8"),
    "uniform axis": (lambda: Uniform(4, axis="heads"), "'channels' or 'tokens'"),
    "uniform no clip": (lambda: Uniform(4, clip=0.0), r"clip: got 0.0; expected in \(0, 1\]"),
    "uniform large clip": (lambda: Uniform(4, clip=1.5), "clip: got 1.5"),
    "uniform group": (lambda: check_both(Uniform(4, group=7)), "7 on 16.*a divisor of 16"),
    "uniform group of tokens": (
        lambda: check_both(Uniform(4, axis="tokens", group=32)),
        "group of tokens: got 32 on 16",
    ),
    "lloyd_max bits": (lambda: lloyd_max(64, 9), "bits: got 9; expected 1 to 8"),
    "lloyd_max dimension": (lambda: lloyd_max(1, 2), "dimension: got 1; expected 2 or more"),
    "codebook levels": (lambda: check_both(Codebook(jnp.ones(3), 2)), "3 levels; expected 4"),
    "gain": (lambda: Normalized(INT4, gain="best"), "'best'.*'unbiased'"),
    "rotation": (lambda: rotated("fourier", D, INT4, rng=rng()), "'haar' or 'hadamard'"),
    "hadamard size": (lambda: check(Linear(Hadamard.plain(8), INT4)), "vectors of 16.*of 8"),
    "rotation size": (lambda: check(Linear(Orthogonal(jnp.eye(8)), INT4)), "vectors of 16.*of 8"),
    "matrix size": (lambda: check(Linear(Matrix.of(jnp.eye(8)), INT4)), "vectors of 16.*of 8"),
    "split order": (lambda: check(Split(jnp.arange(8), INT4, INT4, 4)), "4 of 8 channels.*16"),
    "split count": (lambda: check(Split(jnp.arange(D), INT4, INT4, D)), "16 of 16 channels"),
    "split part": (
        lambda: check(Split(jnp.arange(D), Uniform(4, group=8), INT4, 4)),
        "8 on 4",
    ),
    "outliers none": (lambda: check(Outliers(INT4, INT4, 0)), "0 of 16 channels.*1 to 15"),
    "outliers all": (lambda: check(Outliers(INT4, INT4, D)), "16 of 16 channels"),
    "outliers part": (lambda: check(Outliers(INT4, Uniform(4, group=8), 4)), "8 on 12"),
    "page for signs": (
        lambda: methods.get("turboquant-prod-2", D, layout=kvjax.Layout(recent=24, page=24)),
        "24 tokens for 1-bit codes.*multiple of 16",
    ),
    "page for kivi": (lambda: methods.get("kivi-2", 64, layout=LAYOUT), "32 on 16"),
    "head_dim for kivi": (lambda: methods.get("kivi-4", 48), "32 on 48"),
    "unknown method": (lambda: methods.get("kiwi-2", D), "'kiwi-2'.*kivi-2.*KEYS/VALUES"),
    "unknown values": (lambda: methods.get("kivi-2/nothing", D), "'nothing'.*turboquant-3"),
    "turboquant bits": (lambda: methods.turboquant(2.25, D, rng=rng()), "2.25.*steps of a half"),
    "turboquant many bits": (lambda: methods.turboquant(9, D, rng=rng()), "got 9"),
    "turboquant residual": (
        lambda: methods.turboquant(2, D, rng=rng(), residual="gear"),
        "'gear'.*'qjl'",
    ),
    "turboquant half and residual": (
        lambda: methods.turboquant(2.5, D, rng=rng(), residual="qjl"),
        "2.5.*whole bits",
    ),
    "init capacity": (lambda: empty(capacity=0), "capacity: got 0"),
    "init head_dim": (
        lambda: kvjax.init(methods.get("turboquant-2", 64), capacity=9, kv_heads=1, head_dim=32),
        "vectors of 32; expected vectors of 64",
    ),
    "append batch": (lambda: append(3, 2, D), r"k: got shape \(3, 2, 16\).*batch 2"),
    "append heads": (lambda: append(2, 1, D), "KV heads 2"),
    "append head_dim": (lambda: append(2, 2, 8, side="v"), "v: got shape.*head_dim 16"),
    "append axes": (lambda: append(2, 1, 2, D), "k: got shape"),
    "append integers": (lambda: append(2, 2, D, dtype=jnp.int32), "int32.*floating"),
    "extend heads": (lambda: extend(k=(2, 3, 4, D)), "KV heads 2"),
    "extend values": (lambda: extend(v=(1, 3, 2, D)), "v: got shape"),
    "uniform group of 0": (lambda: check(Uniform(4, group=0)), "group"),
    "uniform group below 0": (lambda: check(Uniform(4, group=-8)), "group"),
    "uniform half bits": (lambda: check(Uniform(2.5)), "bits"),
    "codebook not symmetric": (lambda: check(Codebook(jnp.arange(4.0), 2)), "symmetric"),
    "sketch size": (lambda: check(QJL(jnp.ones((16, 8)))), "16"),
    "sketch kind": (lambda: QJL.random(8, rng=rng(), kind="sparse"), "orthogonal"),
    "mean size": (lambda: check(Centered(jnp.ones(8), INT4)), "16"),
    "head_dim for qjl": (lambda: methods.get("qjl", 8), "8"),
    "layout pool": (lambda: kvjax.Layout(pool=0), "pool"),
    "window": (lambda: empty(window=0), "window"),
    "query heads": (lambda: attend(2, 1, 1, D), "KV heads 2"),
    "query of a block": (lambda: extend(q=(2, 3, 1, 1, D)), "KV heads 2"),
    "blocks of k and v": (lambda: extend(v=(2, 4, 2, D)), "3"),
    "layer": (
        lambda: kvjax.append(
            kvjax.Method(INT4, INT4, LAYOUT), empty(), *[jnp.zeros((2, 2, D))] * 2, layer=1
        ),
        "layer",
    ),
}


def assert_told(mistake, text: str) -> None:
    with pytest.raises(InputError, match=f"(?s){text}") as caught:
        mistake()
    error = caught.value
    assert isinstance(error, ValueError)
    for part in (error.what, error.got, error.expected, error.fix):
        assert str(part).strip()
    assert str(error) == f"{error.what}: got {error.got}; expected {error.expected}; {error.fix}"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    assert_told(*MISTAKES[name])


def test_unknown_methods_list_all_known_ones():
    with pytest.raises(InputError) as caught:
        methods.get("kv", D)
    for name in methods.RECIPES:
        assert name in str(caught.value)


def test_mistakes_show_under_jit_too():
    with pytest.raises(InputError, match="KV heads 2"):
        jax.jit(lambda: append(2, 3, D))()


def test_known():
    assert known(["a", 2]) == "one of a, 2"


def test_right_sizes_pass():
    """Nothing is refused that works: odd head_dims, small pages, every method at its sizes."""
    for name in ("int3", "hadamard-int4", "turboquant-2", "turboquant-3.5"):
        methods.get(name, 80)
    methods.get("kivi-2", 96)
    methods.get("int8", 5, layout=kvjax.Layout(sink=0, recent=0, page=2))
    methods.get("kivi-2", 32, layout=kvjax.Layout(recent=0, page=32))
