"""Config of experiments/long_context.py; `configs/long_context.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Contexts count packed tokens; sink and recent window come on top."""
    config = ConfigDict(
        {
            "parts": ("needles", "speed", "text"),
            "model": "smollm2-135m",  # its calibration is what layers are drawn from
            "calibration": "",  # a folder of `kvjax calibrate`; else made on docstrings
            "calibrate": 8192,  # tokens
            "calibrate_context": 2048,
            # Shapes by the names of models, and the layer of the calibration they begin with.
            "shapes": (("smollm2-135m", 14), ("llama-3.1-8b", 10), ("llama-3.1-70b", 20)),
            "contexts": (8192, 32768, 131072, 1048576),
            "methods": (
                "bf16", "turboquant-4", "turboquant-3", "turboquant-2", "kivi-2", "centred-2",
                "klt-lloyd-max-3", "klt-lloyd-max-2",
            ),
            "layout": (4, 64, 64),  # sink, recent, page
            "queries": 64,  # of all heads of a layer
            "depths": (0.02, 0.25, 0.5, 0.75, 0.98),
            # Nats above the log-sum of the rest; and tokens from which on they fade, 0 for never.
            "margins": ((-2.2, 0), (0.0, 0), (2.2, 0), (2.2, 8192), (4.6, 8192)),
            # Along which keys of needles are moved: see evals.needles.
            "directions": ("query", "likely"),
            "devices": 1,  # 8 are simulated on a CPU
            "mesh": (1, 0),  # over heads, over the sequence; 0 is all that are left
            "speed_shapes": ("llama-3.1-70b",),
            "speed_contexts": (8192, 32768, 131072, 524288, 1048576),
            "speed_methods": ("bf16", "turboquant-3", "turboquant-2", "klt-tiers-2"),
            "rounds": 7,
            "text_model": "gemma-3-270m",
            "text_calibration": "",  # a folder; wanted by calibrated methods of this part
            "text_methods": ("turboquant-3", "turboquant-2"),
            "text": "",  # a file; else the prose of Python's own reference
            "skip": 0,  # characters of it, of front matter
            "text_context": 32768,
            "stretch": 256,  # positions that are compared before each of these ends
            "stretch_ends": (1024, 2048, 4096, 8192, 16384, 24576, 32768),
            "block": 256,  # tokens read at a time
            "seed": 0,
            "out": "runs/long_context",
        }
    )  # fmt: skip
    if variant == "tiny":
        config.update(
            {
                "model": "tests/models/tiny/llama",
                "calibrate": 256,
                "calibrate_context": 64,
                "shapes": (("llama", 1),),
                "contexts": (256, 512),
                "methods": ("bf16", "turboquant-2"),
                "layout": (2, 8, 8),
                "queries": 16,
                "depths": (0.1, 0.9),
                "margins": ((0.0, 0), (2.2, 256)),
                "directions": ("likely",),
                "speed_shapes": ("llama",),
                "speed_contexts": (256, 512),
                "speed_methods": ("bf16", "turboquant-2"),
                "rounds": 2,
                "text_model": "tests/models/tiny/llama",
                "text_methods": ("turboquant-2",),
                "text_context": 256,
                "stretch": 32,
                "stretch_ends": (64, 256),
                "block": 32,
                "out": "runs/long_context_tiny",
            }
        )
    return config
