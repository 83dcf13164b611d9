"""Config of experiments/tokens.py; `configs/tokens.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Every policy with exact tokens; those of `more_policies` with other codes too."""
    config = ConfigDict(
        {
            "model": "smollm2-135m",
            "parts": ("fidelity", "retrieval"),
            "methods": ("bf16",),
            "policies": (
                "all", "random", "streaming", "h2o", "tova", "snapkv", "pyramidkv", "ada-snapkv",
                "key-diff", "key-norm", "expected-attention", "ada-expected-attention", "kvzip",
                "kvzip-head",
            ),
            # klt-2 and the like need the folder of a calibration.
            "more_methods": ("turboquant-3", "kivi-2"),
            "more_policies": ("all", "snapkv", "kvzip-head"),
            "calibration": "",
            "budgets": (256, 512, 1024),  # tokens (ints) or shares of the history
            "layout": (4, 64, 64),  # sink, recent, page
            "block": 256,  # tokens between two evictions
            "text": "",  # a file; else the prose of Python's own reference
            "skip": 0,  # characters of it, of front matter
            "history": 2048,
            "continuation": 128,
            "windows": 2,
            "tasks": ("passkey", "key_value", "copy"),
            "lengths": (1024,),
            "depths": (0.1, 0.5, 0.9),
            "samples": 2,
            "retrieval_budget": 256,
            "retrieval_policies": (),  # all
            "with_question": False,
            "text_as_filler": True,  # else RULER's noise
            "seed": 0,
            "out": "runs/tokens",
        }
    )  # fmt: skip
    if variant == "tiny":
        config.update(
            {
                "model": "tests/models/tiny/llama",
                "policies": ("all", "streaming", "kvzip"),
                "more_methods": ("int2",),
                "more_policies": ("streaming",),
                "budgets": (0.5,),
                "layout": (2, 8, 8),
                "block": 32,
                "history": 128,
                "continuation": 32,
                "windows": 1,
                "tasks": ("passkey",),
                "lengths": (256,),
                "depths": (0.5,),
                "samples": 1,
                "retrieval_budget": 64,
                "retrieval_policies": ("streaming",),
                "text_as_filler": False,
                "out": "runs/tokens_tiny",
            }
        )
    return config
