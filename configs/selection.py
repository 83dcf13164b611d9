"""Config of experiments/selection.py; `configs/selection.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """An indexer of 4 heads and 32 channels, and 256 of 4096 tokens."""
    config = ConfigDict(
        {
            "model": "smollm2-135m",
            "train_text": "",  # a file; else docstrings of Python's standard library
            "train_skip": 0,  # characters of it, of front matter
            "text": "",  # a file; else the prose of Python's own reference
            "skip": 0,
            "context": 4096,
            "windows": 3,  # to train on; one more is for the search of patterns
            "rows": 256,  # queries of each
            "heads": 4,
            "width": 32,
            "steps": 440,
            "step_rows": 64,
            "step_keys": 2048,
            "shared_steps": 120,  # more, for those that stay and serve others
            "k": 256,
            "sink": 4,
            "recent": 64,
            "page": 16,
            "dense": 2,  # first layers that read everything
            "every": 4,  # layers for one indexer
            "starts": (1024, 2048, 3072, 3840),  # of stretches that follow an exact history
            "stretch": 128,
            "seed": 0,
            "out": "runs/selection",
        }
    )
    if variant == "tiny":
        config.update(
            {
                "model": "tests/models/tiny/llama",
                "context": 256,
                "windows": 1,
                "rows": 16,
                "heads": 2,
                "width": 8,
                "steps": 4,
                "step_rows": 8,
                "step_keys": 128,
                "shared_steps": 2,
                "k": 32,
                "sink": 2,
                "recent": 8,
                "page": 8,
                "dense": 1,
                "every": 2,
                "starts": (64, 192),
                "stretch": 16,
                "out": "runs/selection_tiny",
            }
        )
    return config
