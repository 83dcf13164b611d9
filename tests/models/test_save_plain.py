"""Plain models as folders: written, read, and understood by another library."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.models.config import RopeScaling
from kvjax.models.load import load
from kvjax.models.save import save

TINY = Path(__file__).parent / "tiny"


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_folder_says_what_the_model_is(arch, tmp_path):
    model = load(TINY / arch, dtype="float32")
    again = load(save(model, tmp_path / "new"), dtype="float32")
    assert dataclasses.replace(again.config, name=model.config.name) == model.config
    # The 1 in Gemma's norms is taken out and added again, in float32.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-7)
    jax.tree.map(close, again.params, model.params)
    if arch != "gemma3":
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    original = json.loads((TINY / arch / "config.json").read_text())
    assert said["model_type"] == original["model_type"]
    assert said["architectures"] == original["architectures"]
    assert (again.tokenizer is None) == (model.tokenizer is None)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", factor=8.0),
        RopeScaling("llama3", factor=4.0, high_freq_factor=3.0, original_positions=64),
        RopeScaling("table", table=(1.0,) * 7 + (0.5,)),
        None,
    ],
)
def test_scalings_of_rope_are_kept(scaling, tmp_path):
    model = load(TINY / "llama", dtype="float32")
    scaled = dataclasses.replace(model.config, rope_scaling=scaling)
    again = load(save(dataclasses.replace(model, config=scaled), tmp_path / "new"))
    assert again.config.rope_scaling == scaling


def test_what_a_folder_cannot_say(tmp_path):
    model = load(TINY / "qwen3", dtype="float32")
    odd = dataclasses.replace(model.config, attention_scale=0.3)
    with pytest.raises(InputError, match=r"got attention_scale that its config\.json cannot say"):
        save(dataclasses.replace(model, config=odd), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_it(arch, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = load(TINY / arch, dtype="float32")
    tokens = np.arange(3, 35)[None]
    both = []
    for folder in (TINY / arch, save(model, tmp_path / "new")):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            both.append(theirs(torch.tensor(tokens)).logits.numpy())
    np.testing.assert_allclose(both[1], both[0], atol=1e-5)
