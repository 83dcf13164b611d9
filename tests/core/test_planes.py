"""Token planes: bit-exact, where the docstring says, in exactly bits * t * d / 8 bytes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import planes

BITS = range(1, 9)
WORDS = (8, 16, 32)


def codes_of(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_the_definition(bits, word):
    codes = codes_of(bits, (32, 3), seed=bits)
    for transposed in (False, True):
        words = planes.pack(jnp.asarray(codes), bits, transposed=transposed, word=word)
        expected = oracle.pack(codes, bits, word, transposed)
        assert [w.dtype.itemsize * 8 for w in words] == [word] * len(expected)
        for got, want in zip(words, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(got, np.uint64), want)


def test_bit_positions():
    """One token at a time: token j*R + r sets bits b*j .. b*j + b-1 of word r, and no other."""
    for bits in (1, 2, 4, 8):
        rows = 32 * bits // 16
        for token in (0, 1, rows - 1, rows % 32, 31):
            codes = np.zeros((32, 1), int)
            codes[token] = 2**bits - 1
            (words,) = planes.pack(jnp.asarray(codes), bits)
            j, r = divmod(token, rows)
            expected = np.zeros((rows, 1), int)
            expected[r] = (2**bits - 1) << (bits * j)
            np.testing.assert_array_equal(words, expected)


def test_low_bits_go_to_the_first_plane():
    low, high = planes.pack(jnp.full((16, 1), 0b011), 3)
    assert (np.asarray(low) == 0xFFFF).all()
    assert (np.asarray(high) == 0).all()
    low, high = planes.pack(jnp.full((16, 1), 0b100), 3)
    assert (np.asarray(low) == 0).all()
    assert (np.asarray(high) == 0xFFFF).all()


@functools.cache
def round_trip(bits: int, word: int, transposed: bool):
    """One compilation for both ways."""

    def both(codes):
        words = planes.pack(codes, bits, transposed=transposed, word=word)
        return words, planes.unpack(words, bits, transposed=transposed)

    return jax.jit(both, compiler_options={"xla_backend_optimization_level": 0})


@settings(max_examples=20)
@given(
    bits=st.sampled_from(BITS),
    word=st.sampled_from(WORDS),
    tokens=st.sampled_from([32, 96]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip(bits, word, tokens, transposed, seed):
    codes = codes_of(bits, (2, tokens, 3), seed)
    words, back = round_trip(bits, word, transposed)(jnp.asarray(codes, jnp.uint8))
    assert sum(w.nbytes for w in words) * 8 == bits * codes.size
    assert back.dtype == planes.WORDS[word]
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_words(transposed):
    words = planes.pack(jnp.zeros((2, 3, 64, 5), jnp.uint8), 7, transposed=transposed)
    shapes = [(2, 3, 64 * b // 16, 5) for b in (4, 2, 1)]
    assert [w.shape for w in words] == ([(2, 3, 5, s[2]) for s in shapes] if transposed else shapes)


@given(tokens=st.integers(1, 70), bits=st.sampled_from(BITS), word=st.sampled_from(WORDS))
def test_a_page_fits_or_raises(tokens, bits, word):
    # Every plane must fill whole words; the narrowest plane is the lowest set bit of `bits`.
    narrowest = bits & -bits
    fits = tokens * narrowest % word == 0
    assert planes.fits(tokens, bits, word) == fits
    if not fits:
        with pytest.raises(ValueError, match=f"{tokens} tokens of {bits} bits"):
            planes.pack(jnp.zeros((tokens, 1), jnp.uint8), bits, word=word)
