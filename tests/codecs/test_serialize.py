"""Codecs as JSON and arrays: everything comes back equal, and nothing else is taken for a codec."""

from __future__ import annotations

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_laws import codec_of, each

from kvjax.codecs import Centered, Codebook, Dense, Linear, Matrix, Normalized, Residual, Uniform
from kvjax.codecs.serialize import dump, from_bits, known_classes, restore, to_bits
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static


def round_trip(codec: Codec) -> Codec:
    spec, arrays = dump(codec)
    return restore(json.loads(json.dumps(spec)), arrays)


@each
def test_every_codec_of_the_laws_comes_back(name):
    codec = codec_of(name)
    back = round_trip(codec)
    assert back == codec
    assert jax.tree.structure(back) == jax.tree.structure(codec)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(codec), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float32"]
)
def test_dtypes_among_the_choices(dtype):
    assert round_trip(Dense(dtype)).dtype == jnp.dtype(dtype)
    assert round_trip(Normalized(Uniform(4, scale_dtype=dtype))) == Normalized(
        Uniform(4, scale_dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32])
def test_arrays_of_narrow_floats(dtype):
    codec = Centered(jnp.asarray(np.linspace(-2, 2, 8), dtype), Uniform(4))
    _, arrays = dump(codec)
    assert all(a.dtype.isbuiltin == 1 for a in arrays.values())
    assert round_trip(codec) == codec
    assert round_trip(codec).mean.dtype == dtype
    x = np.array([1.5, -2, 448], dtype)
    np.testing.assert_array_equal(from_bits(to_bits(x), np.dtype(dtype)), x)


def test_numbers_are_exact_and_shared_arrays_are_kept_twice():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    codec = Linear(Matrix(a, a), Residual(Uniform(3, clip=0.1 + 0.2), Uniform(2, group=2)))
    spec, arrays = dump(codec)
    assert sorted(arrays) == ["transform.inverse_matrix", "transform.matrix"]
    assert restore(spec, arrays).inner.first.clip == 0.1 + 0.2


def test_a_restored_codec_shares_the_compilation():
    codec = codec_of("turboquant prod")
    encode = jax.jit(lambda codec, x: codec.encode(x))
    x = jnp.ones((16, 24))
    encode(codec, x), encode(round_trip(codec), x)
    assert encode._cache_size() == 1


def test_only_kvjaxs_own_classes_are_known():
    classes = known_classes()
    assert {"Linear", "Hadamard", "Normalized", "Codebook"} <= set(classes)
    assert {"Codec", "Transform", "Array"}.isdisjoint(classes)
    assert all(c.__module__.startswith("kvjax.") for c in classes.values())


@pytree
class Stranger(Codec):
    anything: object = static(default=None)


@pytest.mark.parametrize("value", [len, np.float32(1), {1: 2}, jax.random.key(0), object()])
def test_dump_refuses_what_it_could_not_give_back(value):
    with pytest.raises(InputError, match="codec, inner: got "):
        dump(Normalized(value))
    with pytest.raises(InputError, match="codec, itself: got Stranger"):
        dump(Stranger(value))


def sample() -> Codec:
    return Normalized(Codebook.lloyd_max(24, 2), gain="unbiased")


def change(*path, to):
    """The sample's spec with one node replaced."""

    def apply(spec):
        node = spec
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = to
        return spec

    return apply


def nested(depth):
    spec = True
    for _ in range(depth):
        spec = {"tuple": [spec]}
    return spec


LEVELS = ("fields", "inner", "fields", "levels")
HOSTILE = {
    "no spec": lambda spec: None,
    "a list": lambda spec: [1],
    "only a number": lambda spec: 3,
    "a transform": lambda spec: {"class": "Hadamard", "fields": {"signs": 1}},
    "no known class": change("class", to="Popen"),
    "a function of the package": change("class", to="lloyd_max"),
    "a module's path": change("class", to="os.system"),
    "a base class": change("class", to="Codec"),
    "class is no name": change("class", to=["Normalized"]),
    "fields are a list": change("fields", to=[]),
    "field missing": lambda spec: {"class": "Normalized", "fields": {}},
    "field too many": change("fields", "__class__", to=1),
    "child is a number": change("fields", "inner", to=1),
    "child is an array": change("fields", "inner", to={"array": "inner", "dtype": "int8", "shape": [1]}),
    "choice unknown": change("fields", "gain", to="magic"),
    "choice of another type": change("fields", "gain", to=1),
    "bits true": change("fields", "inner", "fields", "bits", to=True),
    "bits text": change("fields", "inner", "fields", "bits", to="2"),
    "bits huge": change("fields", "inner", "fields", "bits", to=10**30),
    "dtype of objects": change("fields", "scale_dtype", to={"dtype": "O"}),
    "dtype of records": change("fields", "scale_dtype", to={"dtype": "f4,f4"}),
    "dtype that is a function": change("fields", "scale_dtype", to={"dtype": "finfo"}),
    "dtype that is none": change("fields", "scale_dtype", to={"dtype": None}),
    "array elsewhere": change(*LEVELS, "array", to="../levels"),
    "array of another shape": change(*LEVELS, "shape", to=[5]),
    "array of another dtype": change(*LEVELS, "dtype", to="float64"),
    "array without shape": change(*LEVELS, to={"array": "inner.levels"}),
    "nested without end": change("fields", "inner", to=nested(900)),
    "constructor refuses": lambda spec: {
        "class": "Uniform",
        "fields": {**dump(Uniform(8))[0]["fields"], "bits": 9},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_specs_are_one_clear_line(name):
    spec, arrays = dump(sample())
    with pytest.raises(InputError) as error:
        restore(HOSTILE[name](copy.deepcopy(spec)), arrays)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_arrays_must_fit():
    spec, arrays = dump(sample())
    for wrong in (
        {},
        {**arrays, "more": np.zeros(1)},
        {"inner.levels": arrays["inner.levels"][:2]},
    ):
        with pytest.raises(InputError, match="codec"):
            restore(spec, wrong)
    assert dataclasses.is_dataclass(restore(spec, arrays))
