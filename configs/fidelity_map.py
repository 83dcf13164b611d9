"""Config of experiments/fidelity_map.py; `configs/fidelity_map.py:tiny` is what CI runs."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """The map's windows (sink 4, recent 64); pages of 32 keep the exact stretch near 64."""
    config = ConfigDict(
        {
            "model": "smollm2-135m",
            "methods": (
                "bf16", "int8", "int4", "int3", "int2",
                "hadamard-int4", "hadamard-int3", "hadamard-int2",
                "kivi-4", "kivi-2",
                "turboquant-4", "turboquant-3.5", "turboquant-3", "turboquant-2.5", "turboquant-2",
                "turboquant-prod-4", "turboquant-prod-3", "turboquant-prod-2", "qjl",
            ),
            "context": 2048,
            "windows": 2,
            "layout": {"sink": 4, "recent": 64, "page": 32},
            "seed": 0,
            "rounds": 0,
            "out": "runs/fidelity_map",
        }
    )  # fmt: skip
    if variant == "tiny":
        config.update({"methods": ("bf16", "turboquant-2"), "context": 256, "windows": 1})
        config.out = "runs/fidelity_map_tiny"
    return config
