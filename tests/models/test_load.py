import json
import shutil

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file, save_file

from kvjax.core.errors import InputError
from kvjax.models import hub
from kvjax.models.causal import forward
from kvjax.models.config import layer_runs
from kvjax.models.decoder import rope_frequencies
from kvjax.models.gguf_file import _LAYER, _TOP, GGUFFile
from kvjax.models.hf import HFFolder
from kvjax.models.load import leaf_shapes, load

from .make_tiny import TINY


def interleave(weight, head_dim):
    """What llama.cpp's converter does to the rows of q and k."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(arch, path, kind=None):
    """The tiny checkpoint of `arch` as a GGUF file; `kind` quantizes the matrices."""
    source = HFFolder(TINY / arch)
    c = source.config
    w = GGUFWriter(str(path), arch)
    w.add_block_count(c.layers)
    w.add_context_length(c.max_positions)
    w.add_embedding_length(c.d_model)
    w.add_feed_forward_length(c.d_ff)
    w.add_head_count(c.q_heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_vocab_size(c.vocab_size)

    def put(name, leaf, hf_name):
        weight = source.leaf(c, leaf, hf_name)
        if arch == "llama" and leaf in ("wq", "wk"):
            weight = interleave(weight, c.head_dim)
        w.add_tensor(name, np.ascontiguousarray(weight, dtype=np.float32))

    for leaf in ("embed", "final_norm", "head"):
        put(_TOP[leaf], leaf, source.name_of(leaf))
    for layer in range(c.layers):
        for leaf in leaf_shapes(c):
            put(f"blk.{layer}.{_LAYER[leaf]}", leaf, source.name_of(leaf, layer))
    if c.rope_scaling:
        plain = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        table = plain / rope_frequencies(layer_runs(c)[0], c.head_dim)
        w.add_tensor("rope_freqs.weight", table.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    return write_gguf("llama", tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_gguf_gives_the_same_logits(arch, tmp_path):
    model = load(write_gguf(arch, tmp_path / "x.gguf"), dtype="float32")
    with np.load(TINY / arch / "expected.npz") as expected:
        got = forward(model.params, model.config, expected["ids"])
        np.testing.assert_allclose(got, expected["logits"], atol=1e-4)
    assert model.tokenizer is None


def test_every_quantization_of_our_models_has_a_size():
    wanted = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
    assert {GGMLQuantizationType[name] for name in wanted} <= set(GGMLQuantizationType)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    return text


def error_of(path):
    try:
        load(path)
    except InputError as error:
        return str(error)
    return None


def test_gguf_cut_off_anywhere_is_one_clear_line(gguf_path, tmp_path):
    whole, path = gguf_path.read_bytes(), tmp_path / "cut.gguf"
    ends = [0, 3, 4, 7, 8, 23, 24, 30, 60, 200, 800, 2000, len(whole) // 2, len(whole) - 1]
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(InputError) as error:
            load(path)
        assert "cut.gguf" in one_line(error)


def test_gguf_with_a_damaged_header_never_gives_a_raw_error(gguf_path, tmp_path):
    whole, path = gguf_path.read_bytes(), tmp_path / "bad.gguf"
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(4, 2500, 3):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        messages.append(error_of(path))  # any other error than InputError fails the test
    assert sum(message is not None for message in messages) > 150
    assert not any("\n" in message for message in messages if message)


def test_garbage_and_missing_files(tmp_path):
    path = tmp_path / "garbage.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(InputError, match="b'GGUF'"):
        load(path)
    with pytest.raises(InputError, match="no such file or folder"):
        load(tmp_path / "absent.gguf")
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
    with pytest.raises(InputError, match="GGUF version 1"):
        load(path)


def test_big_announced_counts_do_not_take_memory(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16 + bytes(100))
    with pytest.raises(InputError):
        GGUFFile(path)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(TINY / "qwen3", target)
    return target


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_missing_wrong_and_superfluous_tensors_are_named(folder):
    name = "model.layers.1.self_attn.k_proj.weight"
    kept = load_file(folder / "model.safetensors")[name]
    rewrite(folder, lambda w: w.pop(name))
    with pytest.raises(InputError, match=rf"tensor {name} .* got nothing; expected \(32, 48\)"):
        load(folder)
    rewrite(folder, lambda w: w.update({name: kept[:5]}))
    with pytest.raises(InputError, match=rf"tensor {name} .* got \(5, 48\)"):
        load(folder)
    rewrite(folder, lambda w: w.update({name: kept.astype(np.int8)}))
    with pytest.raises(InputError, match=rf"tensor {name} .* got I8; expected one of F32"):
        load(folder)
    rewrite(folder, lambda w: w.update({name: kept, "model.layers.0.extra.weight": kept}))
    with pytest.raises(InputError, match=r"1 tensors that a qwen3 model has no use for"):
        load(folder)


def test_damaged_folders_are_one_clear_line(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (b"", whole[:4], whole[:100], whole[:-10], b"\xff" * 200):
        weights.write_bytes(data)
        with pytest.raises(InputError) as error:
            load(folder)
        assert "model.safetensors" in one_line(error)
    weights.unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="does not parse"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    shutil.copytree(TINY / "llama", tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / "m" / gone).unlink()
    with pytest.raises(InputError, match=gone):
        load(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="no map from tensors to files"):
        load(tmp_path / "m")


def test_names(monkeypatch, tmp_path):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path))
    with pytest.raises(InputError, match="run `kvjax models fetch smollm2-135m`"):
        load("SmolLM2-135M-Instruct")
    with pytest.raises(InputError, match="'gpt-5'; expected one of smollm2-135m, gemma-3-270m"):
        load("gpt-5")
    with pytest.raises(InputError, match="dtype: got int8"):
        load(TINY / "llama", dtype="int8")
    assert hub.home() == tmp_path
