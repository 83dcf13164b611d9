"""Config of experiments/frontier.py; `configs/frontier.py:tiny` is what CI runs."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Texts: NAME=FILE, or one of "docstrings", "reference", "code", which Python brings along."""
    each = lambda name, *widths: tuple(f"{name}{b}" for b in widths)
    config = ConfigDict(
        {
            "models": ("smollm2-135m", "gemma-3-270m"),
            # The first is calibrated on, the others are tested on; transfer takes every pair.
            "texts": ("docstrings", "reference", "code"),
            "parts": ("frontier", "transfer", "seeds", "positions"),
            "methods": (
                "bf16", *each("int", 8, 4, 3, 2), *each("hadamard-int", 4, 3, 2),
                *each("kivi-", 4, 2), "fp8", "nvfp4", "mxfp4",
                *each("turboquant-", 4, 3.5, 3, 2.5, 2), *each("turboquant-prod-", 4, 3, 2), "qjl",
                *each("rabitq-", 4, 3, 2), *each("eden-", 4, 3, 2), *each("e8-", 4, 2),
                *each("trellis-", 4, 3, 2), "polarquant", "oscar", "oscar-lloyd-max",
                *each("centred-", 4, 3, 2), *each("balanced-", 4, 3, 2),
                *each("klt-lloyd-max-", 4, 3, 2), *each("klt-", 4, 3, 2),
                *each("klt-fisher-", 4, 3, 2), *each("klt-layers-", 4, 3, 2),
                *each("klt-pre-rope-", 3, 2), *each("klt-fisher-pre-rope-", 3, 2),
                *each("klt-layers-pre-rope-", 3, 2),
                *each("klt-layers-tiers-", 3, 2), "oscar-canalized-2", "quarot-4",
            ),
            "transfer_methods": ("turboquant-2", "oscar", "klt-2", "klt-layers-2"),
            "seed_methods": ("turboquant-2", "trellis-2", "klt-2", "klt-layers-2"),
            "position_methods": ("turboquant-2", "oscar", "klt-2", "klt-layers-2"),
            "seeds": (0, 1, 2, 3, 4),  # of rotations and sketches; all but `seeds` takes the first
            "layouts": ((4, 64, 64), (64, 256, 64)),  # sink, recent, page; the others take one
            "context": 2048,
            "windows": 4,
            "position_context": 8192,
            "position_windows": 1,
            "buckets": 8,
            "calibrate": 8192,  # tokens
            "calibrate_context": 2048,
            "gradients": 8192,  # tokens; 0 leaves out what klt-fisher methods need
            "gradient_context": 1024,
            "workers": 2,  # methods at a time: compiling keeps one core busy
            "plot_methods": (),  # all
            "out": "runs/frontier",
        }
    )  # fmt: skip
    if variant == "tiny":
        config.update(
            {
                "models": ("tests/models/tiny/llama",),
                "methods": ("turboquant-2", "centred-2"),
                "transfer_methods": ("centred-2",),
                "seed_methods": ("centred-2",),
                "position_methods": ("centred-2",),
                "seeds": (0, 1),
                "layouts": ((4, 16, 16),),
                "context": 128,
                "windows": 1,
                "position_context": 128,  # as above: compiled once
                "buckets": 4,
                "calibrate": 256,
                "calibrate_context": 64,
                "gradients": 0,
                "out": "runs/frontier_tiny",
            }
        )
    return config
