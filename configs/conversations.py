"""Config of experiments/conversations.py; `configs/conversations.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """Cases as `kind/option=value`, see `experiments/conversations_cases.py`."""
    config = ConfigDict(
        {
            "model": "smollm2-135m",
            "data": "",  # a file of conversations; LoCoMo is under CC BY-NC. "": made up
            "conversations": ("conv-26", "conv-30"),
            "limit": 2048,  # tokens of a conversation's beginning
            "budget": 512,  # tokens per KV head and cache
            "block": 512,  # tokens between two evictions
            "layout": (4, 32, 32),  # sink, recent, page
            "episodes": 4,
            "route": "segments",  # of the codes of `episode_methods` but the first
            "embedder": "minilm",  # or "model": the model's own embeddings
            "cases": (
                "all", "episodes", "snapkv", "kvzip", "expected-attention", "key-diff", "h2o",
                "tova", "streaming", "known", "episodes/share=0.25", "snapkv/compete=layer",
                "expected-attention/compete=layer", "kvzip/compete=layer",
                "episodes/compete=layer",
            ),
            # Of the cases above, those that are also measured with these codes underneath.
            "coded": ("all", "episodes", "snapkv"),
            "methods": ("turboquant-3", "kivi-2"),
            "calibration": "",  # a folder of `kvjax calibrate`, from another text, for klt-2
            "batch": 8,  # questions at a time
            "questions": 0,  # at most so many of a conversation; 0 is all
            "seed": 0,
            "out": "runs/conversations",
        }
    )  # fmt: skip
    if variant == "tiny":
        config.update(
            {
                "model": "tests/models/tiny/llama",
                "conversations": ("a",),
                "limit": 1024,
                "budget": 128,
                "block": 256,
                "layout": (4, 16, 16),
                "episodes": 2,
                "embedder": "model",
                "cases": ("episodes", "snapkv"),
                "coded": ("episodes",),
                "methods": ("int2",),
                "batch": 4,
                "questions": 3,
                "out": "runs/conversations_tiny",
            }
        )
    return config
