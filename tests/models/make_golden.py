"""Cuts the large reference arrays down to golden/*.npz (about 100 KB each).

Source: Hugging Face transformers 5.23, eager attention, float32 on CPU, over the dequantized GGUF
files that `kvjax models fetch` gets; 64-token prompts. Run:
  python tests/models/make_golden.py PATH_TO_REFERENCE_ARRAYS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "golden"


def cut(full) -> dict[str, np.ndarray]:
    """ids, greedy continuation, NLL, the top 5 logits of 8 positions, K and V of 2 tokens."""
    top = np.argsort(-full["logits_last8"], axis=-1)[:, :5]  # [8, 5]
    small = {name: full[name] for name in ("ids", "greedy_next16", "nll", "layers")}
    small |= {"top_ids": top, "top_logits": np.take_along_axis(full["logits_last8"], top, -1)}
    for layer in full["layers"]:
        small[f"k_post_{layer}"] = full[f"k_post_{layer}"][:, -2:]  # [h, 2, d]
        small[f"v_{layer}"] = full[f"v_{layer}"][:, -2:]
    return small


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name in ("smollm2", "gemma3"):
        with np.load(Path(sys.argv[1], f"{name}_64.npz")) as full:
            np.savez_compressed(HERE / f"{name}_64.npz", **cut(full))
