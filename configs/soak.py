"""Config of experiments/soak.py; `configs/soak.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """64 sequences over a pool that is now and then too small."""
    config = ConfigDict(
        {
            "method": "turboquant-2",
            "tokens": 200_000,  # appended, of all sequences together
            "sequences": 64,
            "prefixes": 4,  # of them are only read from: others begin as their forks
            "capacity": 256,
            "prefix": 100,  # tokens
            "layout": (4, 16, 16),  # sink, recent, page
            "pool": 260,
            "window": 0,  # tokens of a sliding window, or 0
            "head_dim": 32,
            "kv_heads": 1,
            "queries": 2,  # per KV head
            "active": 0.9,  # share of the sequences that a step adds to
            "forked": 0.6,  # share of the sequences that begin as a fork
            "renewed": 0.01,  # chance of a prefix to be read anew, in a step
            "check_every": 100,  # steps
            "warm_up": 1000,  # steps before memory and programs are counted
            "seed": 0,
            "out": "runs/soak",
        }
    )
    if variant == "tiny":
        config.update(
            {
                "tokens": 1800,
                "sequences": 6,
                "prefixes": 1,
                "capacity": 96,
                "prefix": 60,
                "pool": 13,
                "active": 0.8,
                "check_every": 40,
                "warm_up": 80,
                "out": "runs/soak_tiny",
            }
        )
    return config
