"""Latent attention: DeepSeek's equations, its checkpoints, and Llamas that are converted to it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import kvjax
from kvjax.codecs import Dense, latent
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.generate.plan import forward_block, init_caches, make_plan
from kvjax.models.causal import causal_attend, forward
from kvjax.models.config import Latent, known_configs, layer_runs
from kvjax.models.decoder import Layers, Params, decode_layers, logits
from kvjax.models.hf_config import from_hf
from kvjax.models.load import leaf_shapes, load
from kvjax.models.save import save
from kvjax.models.to_mla import divergence, joint_moments, mixing, to_mla
from kvjax.parallel import ShardingRules, make_mesh, place_params

from .make_tiny import TINY

# float32 against float64: 2 layers of 32 channels
ATOL = 1e-4
HEADS, RANK, TURN, FREE, VALUE, D, T = 4, 16, 8, 12, 10, 32, 21

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "num_hidden_layers": 2,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "kv_lora_rank": RANK,
    "q_lora_rank": 20,
    "qk_rope_head_dim": TURN,
    "qk_nope_head_dim": FREE,
    "v_head_dim": VALUE,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
        "beta_fast": 2,
        "beta_slow": 1,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 256,
    "eos_token_id": 1,
}


def tensors_of(config: dict) -> dict[str, np.ndarray]:
    """Random weights in the names and shapes of DeepSeek's checkpoints."""
    rng = np.random.default_rng(3)
    width, q_rank = config["intermediate_size"], config["q_lora_rank"]
    shapes = {"model.embed_tokens": (40, D), "lm_head": (40, D), "model.norm": (D,)}
    for i in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.kv_a_proj_with_mqa": (RANK + TURN, D),
            "self_attn.kv_a_layernorm": (RANK,),
            "self_attn.kv_b_proj": (HEADS * (FREE + VALUE), RANK),
            "self_attn.o_proj": (D, HEADS * VALUE),
            "mlp.gate_proj": (width, D),
            "mlp.up_proj": (width, D),
            "mlp.down_proj": (D, width),
            "self_attn.q_a_proj": (q_rank, D),
            "self_attn.q_a_layernorm": (q_rank,),
            "self_attn.q_b_proj": (HEADS * (FREE + TURN), q_rank),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    draw = lambda shape: (
        1 + 0.2 * rng.normal(size=shape)
        if len(shape) == 1
        else rng.normal(size=shape) * 1.5 / np.sqrt(shape[-1])
    )
    return {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}


def yarn_frequencies(config: dict) -> np.ndarray:
    """Radians per position of each pair: slow ones divided by the factor (arXiv 2309.00071)."""
    yarn, dim, base = config["rope_scaling"], TURN, config["rope_theta"]
    out = []
    find = lambda turns: (
        dim
        * np.log(yarn["original_max_position_embeddings"] / (turns * 2 * np.pi))
        / (2 * np.log(base))
    )
    low, high = np.floor(find(yarn["beta_fast"])), np.ceil(find(yarn["beta_slow"]))
    for i in range(dim // 2):
        plain, ramp = base ** (-2 * i / dim), min(max((i - low) / (high - low), 0), 1)
        out.append(plain / yarn["factor"] * ramp + plain * (1 - ramp))
    return np.array(out)


def oracle(config: dict, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits `[t, V]` float64 by the equations of arXiv 2405.04434, keys and values of every head
    made in full, neighbours rotating as complex numbers."""
    w = {name.removesuffix(".weight"): a.astype(np.float64) for name, a in weights.items()}
    norm = lambda x, a: x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * a
    turns = np.exp(1j * np.arange(len(ids))[:, None] * yarn_frequencies(config))  # [t, d/2]
    rope = lambda x: ((x[..., ::2] + 1j * x[..., 1::2]) * turns).view(np.float64)
    mscale = 0.1 * config["rope_scaling"]["mscale_all_dim"] * np.log(4.0) + 1
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    x = w["model.embed_tokens"][ids]
    for i in range(config["num_hidden_layers"]):
        at = lambda name, i=i: w[f"model.layers.{i}.{name}"]
        y = norm(x, at("input_layernorm"))
        low = norm(y @ at("self_attn.q_a_proj").T, at("self_attn.q_a_layernorm"))
        q = (low @ at("self_attn.q_b_proj").T).reshape(len(ids), HEADS, FREE + TURN)
        made = y @ at("self_attn.kv_a_proj_with_mqa").T
        c = norm(made[:, :RANK], at("self_attn.kv_a_layernorm"))
        turned = rope(np.ascontiguousarray(made[:, RANK:]))
        up = (c @ at("self_attn.kv_b_proj").T).reshape(len(ids), HEADS, FREE + VALUE)
        out = []
        for head in range(HEADS):
            query = rope(np.ascontiguousarray(q[:, head, FREE:]))
            scores = q[:, head, :FREE] @ up[:, head, :FREE].T + query @ turned.T
            scores = np.where(causal, scores * mscale**2 / np.sqrt(FREE + TURN), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(p / p.sum(-1, keepdims=True) @ up[:, head, FREE:])
        x = x + np.concatenate(out, -1) @ at("self_attn.o_proj").T
        y = norm(x, at("post_attention_layernorm"))
        gate = y @ at("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ at("mlp.up_proj").T)) @ at("mlp.down_proj").T
    return norm(x, w["model.norm"]) @ w["lm_head"].T


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A loaded tiny model, prompts and the oracle's logits of them."""
    folder, weights = tmp_path_factory.mktemp("deepseek"), tensors_of(DEEPSEEK)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    ids = np.random.default_rng(4).integers(0, 40, (2, T)).astype(np.int32)
    expected = np.stack([oracle(DEEPSEEK, weights, row) for row in ids])
    return load(folder, dtype="float32"), ids, expected


def exact(config) -> Method:
    """The latent kept once, in float32; pages are packed from the 9th token on."""
    codecs = latent(Dense("float32"), config.latent.rank, config.head_dim, Dense("float32"))
    return Method(*codecs, kvjax.Layout(sink=1, recent=4, page=4))


def through_caches(plan, params, ids, block: int) -> jax.Array:
    """Logits of a prompt fed block by block through real caches."""
    caches = init_caches(plan, batch=len(ids), capacity=T, dtype=jnp.float32)
    assert all(cache.window_value.size == 0 for cache in caches)
    step = jax.jit(forward_block)
    out = []
    for start in range(0, T, block):
        hidden, caches, ok = step(plan, params, caches, ids[:, start : start + block])
        assert bool(ok.all())
        out.append(logits(params, plan.config, hidden))
    assert int(caches[0].packed.min()) > 0
    return jnp.concatenate(out, 1)


def test_a_deepseek_checkpoint_computes_the_equations(deepseek):
    """Absorbed against naive, halves against neighbours, with yarn and low-rank queries."""
    model, ids, expected = deepseek
    got = forward(model.params, model.config, ids)
    np.testing.assert_allclose(got, expected, atol=ATOL)
    assert float(np.std(expected)) > 0.5


def test_the_latent_cache_gives_the_same_logits(deepseek):
    model, ids, expected = deepseek
    plan = make_plan(model.config, exact(model.config))
    np.testing.assert_allclose(through_caches(plan, model.params, ids, 7), expected, atol=ATOL)
    steps = through_caches(plan, model.params, ids, 1)
    np.testing.assert_allclose(steps, expected, atol=ATOL)


@pytest.mark.usefixtures("keep_no_programs")
def test_over_devices_of_data_and_sequence(deepseek):
    model, ids, expected = deepseek
    rules = ShardingRules(make_mesh(2, 1, 2))
    plan = make_plan(model.config, exact(model.config), rules=rules)
    params = place_params(rules, model.params, model.config)
    np.testing.assert_allclose(through_caches(plan, params, ids, 7), expected, atol=ATOL)
    with pytest.raises(InputError, match="2 devices of heads, for a latent that all heads share"):
        make_plan(model.config, exact(model.config), rules=ShardingRules(make_mesh(1, 2, 1)))


# --- configs -----------------------------------------------------------------------------------
LITE = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "vocab_size": 102_400,
    "num_hidden_layers": 27,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_theta": 10_000,
    "rope_scaling": DEEPSEEK["rope_scaling"]
    | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
}


def test_shapes_of_deepseek_v2_lite():
    """Attention sizes of the published model, with dense feed-forward layers; nothing allocated."""
    config = from_hf(LITE)
    assert config.latent == Latent(512, 64, 128, 128)
    assert config.kv_bytes_per_token(2) == 27 * (512 + 64) * 2
    shape = lambda name, s: jax.ShapeDtypeStruct(
        (27, *s[::-1]), jnp.float32 if "norm" in name else jnp.bfloat16
    )
    layers = Layers(**{name: shape(name, s) for name, s in leaf_shapes(config).items()})
    table = jax.ShapeDtypeStruct((102_400, 2048), jnp.bfloat16)
    params = Params(table, (layers,), jax.ShapeDtypeStruct((2048,), jnp.float32), table)
    weights = [a.size for a in jax.tree.leaves(params) if a.dtype == jnp.bfloat16]
    assert sum(weights) == config.weight_count()
    method = Method(*latent(Dense(), 512, 576), kvjax.Layout(sink=0, recent=64, page=64))

    def run(params, tokens):
        plan = make_plan(config, method)
        caches = init_caches(plan, batch=2, capacity=256)
        hidden, caches, _ = forward_block(plan, params, caches, tokens)
        return logits(params, config, hidden), caches

    out, (cache,) = jax.eval_shape(run, params, jax.ShapeDtypeStruct((2, 128), jnp.int32))
    assert out.shape == (2, 128, 102_400)
    assert cache.window_key.shape == (27, 2, 1, 128, 576)
    assert cache.window_value.shape[-1] == 0
    pages = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.key_pages))
    assert pages == 27 * 2 * 3 * 64 * (512 + 64) * 2


def test_what_the_decoder_has_not_is_refused():
    experts = LITE | {"n_routed_experts": 64, "first_k_dense_replace": 1}
    with pytest.raises(InputError, match=r"n_routed_experts in config\.json: got 64; expected 0"):
        from_hf(experts)
    assert from_hf(LITE | {"n_routed_experts": 0}).latent is not None
    scaling = LITE["rope_scaling"] | {"mscale": 1.0}
    with pytest.raises(InputError, match=r"mscale .* the same as mscale_all_dim"):
        from_hf(LITE | {"rope_scaling": scaling})
    no_factor = {name: a for name, a in LITE["rope_scaling"].items() if name != "factor"}
    with pytest.raises(InputError, match=r"factor in rope scaling .* got nothing"):
        from_hf(LITE | {"rope_scaling": no_factor})
    with pytest.raises(InputError, match=r"mscale_all_dim in rope scaling .* got 'a'"):
        from_hf(LITE | {"rope_scaling": no_factor | {"mscale": "a", "mscale_all_dim": "a"}})
    with pytest.raises(InputError, match=r"rotary_dim of .* got 7; expected an even number"):
        from_hf(LITE | {"qk_rope_head_dim": 7, "kv_lora_rank": 17, "rope_scaling": None})
    with pytest.raises(InputError, match=r"latent: got Latent.*; expected sizes of 1 or more"):
        Latent(rank=52, rotary_dim=-16, nope_dim=12, value_dim=8)
    table = {"rope_type": "table", "table": [1.0, 2.0]}
    with pytest.raises(InputError, match="a table of 2 entries; expected one for each of the 32"):
        from_hf(LITE | {"rope_scaling": table})
    with pytest.raises(InputError, match="one KV head of the latent's width"):
        dataclasses.replace(from_hf(LITE), kv_heads=2, head_dim=64)


# --- conversion --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama():
    """A tiny Llama of 2 KV heads of 16, its moments, and prompts."""
    model = load(TINY / "llama", dtype="float32")
    with np.load(TINY / "llama" / "expected.npz") as data:
        ids, expected = data["ids"], data["logits"]
    return model, joint_moments(model.params, model.config, jnp.asarray(ids)), ids, expected


def test_moments_are_of_keys_before_rope_and_values(llama):
    model, moments, ids, _ = llama
    layers, x = (
        model.params.runs[0],
        np.asarray(model.params.embed, np.float64)[ids].reshape(-1, 48),
    )
    weight, eps = np.asarray(layers.attn_norm[0], np.float64), model.config.norm_eps
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    both = x @ np.concatenate([layers.wk[0], layers.wv[0]], 1).astype(np.float64)
    np.testing.assert_allclose(moments[0], both.T @ both / len(x), atol=1e-4)


def test_all_rotary_heads_and_the_full_rank_lose_nothing(llama, tmp_path):
    model, moments, ids, expected = llama
    exact_one = to_mla(model, moments, rank=32, rope_heads=2)
    config = exact_one.config
    assert config.latent == Latent(32, 16, 0, 16, rotary_heads=2, norm=False)
    assert config.kv_bytes_per_token() == model.config.kv_bytes_per_token()
    np.testing.assert_allclose(forward(exact_one.params, config, ids), expected, atol=ATOL)
    kl = divergence(model.params, model.config, exact_one.params, config, ids[0])
    assert float(jnp.abs(kl).max()) < 1e-6
    again = load(save(exact_one, tmp_path / "mla"), dtype="float32")
    assert dataclasses.replace(again.config, name=config.name) == config
    jax.tree.map(np.testing.assert_array_equal, again.params, exact_one.params)
    with pytest.raises(InputError, match="expected a new folder"):
        save(exact_one, tmp_path / "mla")


def test_the_mixing_is_orthogonal_and_commutes_with_rope(llama):
    _, moments, _, _ = llama
    mix = mixing(np.asarray(moments[1, :32, :32], np.float64), 2)
    np.testing.assert_allclose(mix @ mix.T, np.eye(32), atol=1e-12)
    angles = np.random.default_rng(0).normal(size=8)
    one = np.zeros((16, 16))
    for i, a in enumerate(angles):
        at = np.ix_([i, i + 8], [i, i + 8])
        one[at] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    rope = np.kron(np.eye(2), one)
    np.testing.assert_allclose(mix @ rope, rope @ mix, atol=1e-12)
    kept = np.diag(mix @ np.asarray(moments[1, :32, :32]) @ mix.T)
    assert kept[:16].sum() > np.trace(np.asarray(moments[1, :16, :16]))


def test_one_rotary_head_loses_only_rotation_and_rank(llama, tmp_path):
    """Where nothing rotates (all tokens at position 0) the full rank is exact, and only that."""
    model, moments, ids, _ = llama
    positions = jnp.zeros(ids.shape, jnp.int32)

    def hidden(one):
        attend = causal_attend(layer_runs(one.config), positions)
        return decode_layers(one.params, one.config, ids, positions, attend, (None,))[0]

    expected, errors = hidden(model), []
    for rank in (48, 13):
        small = to_mla(model, moments, rank=rank, rope_heads=1)
        assert small.config.kv_bytes_per_token(1) == 3 * (rank + 16)
        errors.append(float(jnp.abs(hidden(small) - expected).mean()))
    assert errors[0] < ATOL < 0.01 < errors[1]
    given = (model.params, model.config, small.params, small.config)
    both = [np.asarray(forward(p, c, ids[:1])[0], np.float64) for p, c in (given[:2], given[2:])]
    sure, ours = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in both)
    expected = (np.exp(sure) * (sure - ours)).sum(-1)
    np.testing.assert_allclose(divergence(*given, jnp.asarray(ids[0])), expected, rtol=1e-2)
    again = load(save(small, tmp_path / "small"), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)


def test_only_llamas_are_converted(llama):
    model, moments, _, _ = llama
    qwen = load(TINY / "qwen3", dtype="float32")
    with pytest.raises(InputError, match="got qk_norm, arch qwen3; expected a Llama"):
        to_mla(qwen, moments, rank=8, rope_heads=1)
    for rank, heads in ((0, 1), (49, 1), (33, 2)):
        with pytest.raises(InputError, match=rf"rank: got {rank}; expected 1 to"):
            to_mla(model, moments, rank=rank, rope_heads=heads)
    with pytest.raises(InputError, match="rope_heads: got 3; expected 1 to the 2 KV heads"):
        to_mla(model, moments, rank=8, rope_heads=3)
    others = jnp.concatenate([moments, moments])
    with pytest.raises(InputError, match=r"moments: got shape .*; expected \(3, 64, 64\)"):
        to_mla(model, others, rank=8, rope_heads=1)
    for spoilt in (moments.at[1, 0, 0].set(jnp.nan), moments.at[1, :32].set(0)):
        with pytest.raises(InputError, match="moments: got NaN or infinity, or a layer whose"):
            to_mla(model, spoilt, rank=8, rope_heads=1)


def test_only_what_a_folder_can_say_is_saved(deepseek, tmp_path):
    model, _, _ = deepseek
    save_as = lambda folder, **fields: save(
        dataclasses.replace(model, config=dataclasses.replace(model.config, **fields)), folder
    )
    again = load(save_as(tmp_path / "gelu", activation="gelu_tanh"), dtype="float32")
    assert again.config == dataclasses.replace(model.config, name="gelu", activation="gelu_tanh")
    with pytest.raises(InputError, match=r"got layer_map that its config\.json cannot say"):
        save_as(tmp_path / "borrows", layer_map=(0, 0))
    assert not (tmp_path / "borrows").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="got what holds files already"):
        save_as(tmp_path / "file" / "below")
    half = dataclasses.replace(
        model, params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    )
    again = load(save(half, tmp_path / "half"), dtype="bfloat16")
    np.testing.assert_array_equal(again.params.runs[0].w_uk, half.params.runs[0].w_uk)
    np.testing.assert_array_equal(again.params.runs[0].wq, half.params.runs[0].wq)


def test_a_view_of_other_channels_is_refused(deepseek, llama):
    """Under jit a cache takes values from the keys without a look at those it is given."""
    config = deepseek[0].config
    with pytest.raises(InputError, match="got values that are channels 0 to 9 of the keys"):
        make_plan(config, Method(*latent(Dense(), 10, config.head_dim)))
    view = Method(*latent(Dense(), 10, 16))
    for methods in (view, (view,) * 3):
        with pytest.raises(InputError, match="of llama, which are apart from the keys"):
            make_plan(llama[0].config, methods)


@pytest.mark.model
@pytest.mark.parametrize("real", ["smollm2-135m"], indirect=True)
def test_smollm2_at_full_rank_is_smollm2(real):
    _, model = real
    text = "It is a truth universally acknowledged, that a single man in possession of a good "
    ids = jnp.asarray([(model.tokenizer.encode(text * 5))[:64]])
    moments = joint_moments(model.params, model.config, ids)
    made = to_mla(model, moments, rank=192, rope_heads=3)
    assert made.config.kv_bytes_per_token() == known_configs()["smollm2-135m"].kv_bytes_per_token()
    want, got = (forward(one.params, one.config, ids) for one in (model, made))
    np.testing.assert_allclose(got, want, atol=1e-3)
