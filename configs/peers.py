"""Config of experiments/peers.py; `configs/peers.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Both usual head dimensions, three rotations each."""
    each = lambda name, widths: tuple(f"{name}-{b}" for b in widths)
    config = ConfigDict(
        {
            "methods": (
                *each("turboquant", (1, 2, 3, 4)),
                *each("turboquant-prod", (1, 2, 3, 4)),
                *each("eden-search", (2, 3, 4)),
                *each("rabitq", (1, 2, 3, 4)),
                "e8-2",
                *each("trellis", (1, 2, 3, 4)),
            ),
            "dims": (128, 64),
            "page": 64,
            "values": 131072,
            "seed": 1,  # of the vectors
            "seeds": (0, 1, 2),  # of rotations and sketches
            "limit_s": 300,  # per peer
            "out": "runs/peers_full",
        }
    )
    if variant == "tiny":
        config.methods = ("turboquant-2",)
        config.dims = (64,)
        config.values = 16384
        config.seeds = (0, 1)
        config.out = "runs/peers_tiny"
    return config
