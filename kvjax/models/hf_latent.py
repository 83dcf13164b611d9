"""How DeepSeek's checkpoints lay out latent attention, read and written.

    kv_a_proj_with_mqa [r + d_R, D]       the latent's rows, then the rotary ones
    kv_b_proj [H*(n + d_v), r]            of each head its W_UK [n, r], then its W_UV [d_v, r]
    q_proj or q_b_proj [H*(n + d_R), .]   of each head the position-free rows, then the rotary ones

DeepSeek rotates neighbours, channels (2i, 2i + 1); we rotate halves, (i, i + d/2). The rotary rows
of queries and keys are put in our order alike, which changes no logit. Models that kvjax converted
are written in halves, and say so (`rope_interleave`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvjax.models.config import Latent, ModelConfig, RopeScaling

UP = "self_attn.kv_b_proj.weight"
KEYS, VALUES = UP + "#keys", UP + "#values"  # the two parts of the one tensor

NAMES = {
    "wk": "self_attn.kv_a_proj_with_mqa.weight",
    "k_norm": "self_attn.kv_a_layernorm.weight",
    "w_uk": KEYS,
    "wv": VALUES,
}
_PLAIN_Q = {"wq": "self_attn.q_proj.weight"}
_LOW_RANK_Q = {
    "w_dq": "self_attn.q_a_proj.weight",
    "q_norm": "self_attn.q_a_layernorm.weight",
    "wq": "self_attn.q_b_proj.weight",
}


def names(latent: Latent) -> dict[str, str]:
    """Tensor names, within a layer, of the leaves of latent attention."""
    return NAMES | (_PLAIN_Q if latent.q_rank is None else _LOW_RANK_Q)


def tensor_of(name: str) -> str:
    """The tensor that a name is a part of, or the name itself."""
    return name.partition("#")[0]


def parts_of(latent: Latent, name: str) -> list[str]:
    """The names that stand for a tensor: one, but for that of keys and values."""
    if not name.endswith(UP):
        return [name]
    return [f"{name}#{part}" for part in (("keys",) if latent.nope_dim else ()) + ("values",)]


def part_rows(config: ModelConfig, name: str, rows: int) -> int:
    """Rows of a part, of the `rows` of its tensor; -1 where these are not those of all heads."""
    latent = config.latent
    assert latent is not None
    if "#" not in name:
        return rows
    keys, values = latent.nope_dim, latent.value_dim
    if rows != config.q_heads * (keys + values):
        return -1
    return config.q_heads * (keys if name.endswith("#keys") else values)


def read_part(config: ModelConfig, leaf: str, name: str, tensor: np.ndarray, pairs: bool):
    """A leaf, [out, in] with halves rotating, from the tensor that holds it.

    Args:
      pairs: whether neighbours rotate in the checkpoint.
    """
    latent, heads = config.latent, config.q_heads
    assert latent is not None
    if "#" in name:
        each = tensor.reshape(heads, latent.nope_dim + latent.value_dim, latent.rank)
        keys = name.endswith("#keys")
        own = each[:, : latent.nope_dim] if keys else each[:, latent.nope_dim :]
        return own.reshape(-1, latent.rank)
    if not pairs or leaf not in ("wq", "wk"):
        return tensor
    if leaf == "wk":
        return np.concatenate([tensor[: latent.rank], _halves(latent, tensor[latent.rank :])])
    each = tensor.reshape(heads, -1, tensor.shape[-1])
    rows = [
        np.concatenate([a[: latent.nope_dim], _halves(latent, a[latent.nope_dim :])]) for a in each
    ]
    return np.concatenate(rows)


def join_up(config: ModelConfig, keys: np.ndarray | None, values: np.ndarray) -> np.ndarray:
    """The one tensor of W_UK [H*n, r] and W_UV [H*d_v, r], as checkpoints have it."""
    split = lambda a: a.reshape(config.q_heads, -1, a.shape[-1])
    parts = [split(a) for a in (keys, values) if a is not None]
    return np.concatenate(parts, 1).reshape(-1, values.shape[-1])


def read_config(c: Any) -> Latent:
    """Latent attention as DeepSeek's configs describe it, or `hf_json.config_json`.

    Args:
      c: a section of the file, of `hf_config`.
    """
    experts, layers = c.get("n_routed_experts", 0), c.integer("num_hidden_layers")
    dense = c.integer("first_k_dense_replace") if c.get("first_k_dense_replace") else 0
    if experts and dense < layers:
        raise c.error("n_routed_experts", experts, "0: kvjax's decoder has no experts")
    return Latent(
        rank=c.integer("kv_lora_rank"),
        rotary_dim=c.integer("qk_rope_head_dim"),
        nope_dim=c.integer("qk_nope_head_dim") if c.get("qk_nope_head_dim", 1) else 0,
        value_dim=c.integer("v_head_dim"),
        q_rank=None if c.get("q_lora_rank") is None else c.integer("q_lora_rank"),
        rotary_heads=c.integer("qk_rope_heads", 1),
        norm=bool(c.get("latent_norm", True)),
    )


def default_scale(c: Any, latent: Latent) -> float:
    """1 / sqrt(n + d_R), and with yarn the square of its `mscale_all_dim` factor, whose numbers
    `yarn` has checked."""
    scale = (latent.nope_dim + latent.rotary_dim) ** -0.5
    rope = c.section("rope_parameters") or c.section("rope_scaling")
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return scale
    return scale * (0.1 * rope["mscale_all_dim"] * math.log(max(rope["factor"], 1)) + 1) ** 2


def yarn(c: Any, s: Any) -> RopeScaling:
    """Yarn (arXiv 2309.00071) as DeepSeek's code has it, as a table of divisors of frequencies.

    Args:
      c, s: sections of the file and of its rope scaling.
    """
    if s.get("mscale", 1) != s.number("mscale_all_dim"):
        raise s.error("mscale", s.get("mscale", 1), "the same as mscale_all_dim")
    dim = c.integer("qk_rope_head_dim")
    theta = float(s.number("rope_theta", c.get("rope_theta", 1e4)))
    factor, trained = s.number("factor"), s.integer("original_max_position_embeddings")

    def pair(turns: float) -> float:  # that turns so often in the trained context
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(s.number("beta_fast", 32))), 0)
    high = min(math.ceil(pair(s.number("beta_slow", 1))), dim - 1)
    span = max(high - low, 1e-3)
    stretched = [min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)]
    return RopeScaling("table", table=tuple(1 / (1 - x + x / factor) for x in stretched))


def _halves(latent: Latent, rows: np.ndarray) -> np.ndarray:
    """Rotary rows [heads * d, .] from neighbours to halves."""
    each = rows.reshape(latent.rotary_heads, -1, 2, rows.shape[-1])
    return each.swapaxes(1, 2).reshape(rows.shape)
