"""Writes tiny random checkpoints and their logits by transformers into tests/models/tiny/.

Run once, in an environment with torch and transformers:  python tests/models/make_tiny.py
The tests then compare our loader and decoder with `expected.npz`, without torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

TINY = Path(__file__).parent / "tiny"
ARCHS = ("llama", "qwen2", "qwen3", "gemma3")
VOCAB, TOKENS = 96, 24

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_hidden_layers": 3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def settings() -> dict[str, tuple[str, dict]]:
    """Folder name -> (transformers family, config values)."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    slide = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    gemma = {"query_pre_attn_scalar": 24, "sliding_window": 8, "layer_types": types}
    return {
        "llama": ("Llama", {**COMMON, "rope_parameters": LLAMA3}),
        "qwen2": ("Qwen2", {**COMMON, **plain, **slide, "tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {**COMMON, **plain}),
        "gemma3": ("Gemma3", {**COMMON, **gemma, "rope_parameters": GEMMA_ROPE}),
    }


def build(family: str, values: dict):
    """A random model whose norms and biases are random too (their defaults would hide mistakes)."""
    import torch
    import transformers

    torch.manual_seed(0)
    suffix = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{suffix}Config")(**values)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            small = name.endswith("bias") or "norm" in name
            weight.add_(torch.randn_like(weight) * (0.3 if small else 0.1))
    return model


def prompt() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (2, TOKENS)).astype(np.int32)


def logits_of(model, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()


def main() -> None:
    for arch, (family, values) in settings().items():
        model, folder = build(family, values), TINY / arch
        model.save_pretrained(folder, max_shard_size="160KB" if arch == "llama" else "5GB")
        np.savez_compressed(
            folder / "expected.npz", ids=prompt(), logits=logits_of(model, prompt())
        )
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
