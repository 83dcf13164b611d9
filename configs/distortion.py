"""Config of experiments/distortion.py; `configs/distortion.py:tiny` is what CI runs."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Every name of `kvjax describe` that is a code, at its own rates."""
    from kvjax.methods import RECIPES

    config = ConfigDict(
        {
            "methods": tuple(name for name in RECIPES if name != "bf16"),
            "dims": (64, 128, 256, 1536),
            "data": ("sphere", "heavy", "outliers"),
            "models": ("smollm2-135m", "gemma-3-270m"),
            "text": None,
            "page": 64,
            "values": 131072,
            "seed": 0,
            "repeats": 3,
            "out": "runs/distortion_full",
        }
    )
    if variant == "tiny":
        config.methods = ("turboquant-2", "eden-2", "e8-2", "trellis-2")
        config.dims = (64,)
        config.models = ()
        config.values = 16384
        config.out = "runs/distortion_tiny"
    return config
