"""Parity of the two real models with Hugging Face transformers (float32, eager, CPU)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models.causal import forward, keys_and_values
from kvjax.models.decoder import logits

pytestmark = pytest.mark.model

# Arrays too large to keep here (full logits rows, K and V of 512 tokens); see make_golden.py.
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
TEXT = "Tabs\t\tand  spaces\n\n\n1234 56.78 漢字かな 🎉👩‍👩‍👧 café naïve don't I'LL"

_observe = jax.jit(keys_and_values, static_argnums=1)


def relative(got, want):
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def test_golden_logits_keys_and_values(real, golden):
    _, model = real
    ids = jnp.asarray(golden["ids"])[None]
    hidden, keys, values = _observe(model.params, model.config, ids)
    out = logits(model.params, model.config, hidden)[0]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(out[:-1]), ids[0, 1:, None], -1)[:, 0]
    np.testing.assert_allclose(nll, golden["nll"], atol=2e-3)
    top = np.argsort(-out[-8:], axis=-1)[:, :5]
    np.testing.assert_array_equal(top, golden["top_ids"])
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(out[-8:]), top, -1), golden["top_logits"], atol=2e-3
    )
    for layer in golden["layers"]:
        assert relative(keys[layer, 0, :, -2:], golden[f"k_post_{layer}"]) < 1e-3
        assert relative(values[layer, 0, :, -2:], golden[f"v_{layer}"]) < 1e-3


def test_golden_greedy_continuation(real, golden):
    _, model = real
    start, want = len(golden["ids"]), golden["greedy_next16"]
    tokens = np.zeros((1, start + len(want)), np.int32)
    tokens[0, :start] = golden["ids"]

    @jax.jit
    def next_token(params, tokens, length):
        out = forward(params, model.config, tokens, lengths=length[None])
        return jnp.argmax(out[0, length - 1])

    for length in range(start, start + len(want)):
        tokens[0, length] = next_token(model.params, tokens, jnp.int32(length))
    np.testing.assert_array_equal(tokens[0, start:], want)


@pytest.mark.parametrize("length", [64, 512])
def test_reference_arrays(real, length):
    short, model = real
    path = REFERENCE / f"{short}_{length}.npz"
    if not path.is_file():
        pytest.skip("the large reference arrays are not here")
    with np.load(path) as want:
        hidden, keys, values = _observe(model.params, model.config, jnp.asarray(want["ids"])[None])
        out = logits(model.params, model.config, hidden[0, -8:])
        np.testing.assert_allclose(out, want["logits_last8"], atol=2e-3)
        np.testing.assert_allclose(hidden[0], want["hidden_final"], atol=2e-3)
        for layer in want["layers"]:
            assert relative(keys[layer, 0], want[f"k_post_{layer}"]) < 1e-3
            assert relative(values[layer, 0], want[f"v_{layer}"]) < 1e-3
        text = model.tokenizer.decode(want["ids"])
        assert model.tokenizer.encode(text) == want["ids"].tolist()


def test_tokenizer_round_trip(real, golden):
    _, model = real
    tokenizer = model.tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode(tokenizer.decode(golden["ids"])) == golden["ids"].tolist()
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokenizer.encode(TEXT))) + stream.finish() == TEXT


def test_special_ids(real):
    short, model = real
    ids = model.tokenizer.encode("a")
    assert (ids[0] == 2) == (short == "gemma3")
    assert model.tokenizer.eos_ids == model.config.eos_ids
    if short == "smollm2":
        chat = model.tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
        assert chat[0] == 1
        assert chat.count(2) == 2
