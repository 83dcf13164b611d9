"""Config of experiments/tune_shift.py; `configs/tune_shift.py:tiny` is what tests run."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """SmolLM2 learns the harbour, and hands it on to Gemma 3."""
    config = ConfigDict(
        {
            "model": "smollm2-135m",  # the base; tuned on the domain it is the teacher
            "target": "gemma-3-270m",
            "ships": 8,
            "general": 24,  # prompts that have nothing to do with it
            "rehearsed": 24,  # others of that kind, with the base's answers, to tune with
            "seeds": 8,  # specialised prompts to begin with
            # Of the base's perplexity over the tuned model's; 0 is `Judged.midpoint` of the seeds.
            "threshold": 0.0,
            "wanted": 80,  # prompts to hand on
            "rounds": 8,
            "max_new": 16,
            "tuning": {"steps": 60, "rate": 2e-3, "rank": 16, "batch": 8},
            "teaching": {"steps": 60, "rate": 2e-3, "rank": 16, "batch": 8},
            "seed": 0,
            "out": "runs/tune_shift",
        }
    )
    if variant == "tiny":
        config.update(
            {
                "model": "tests/models/tiny/llama",
                "target": "tests/models/tiny/qwen3",
                "ships": 1,
                "general": 4,
                "rehearsed": 2,
                "seeds": 2,
                "threshold": 1.0,
                "wanted": 4,
                "rounds": 2,
                "max_new": 4,
                "tuning": {"steps": 4, "rate": 1e-2, "rank": 2, "batch": 4},
                "teaching": {"steps": 2, "rate": 1e-2, "rank": 2, "batch": 4},
                "out": "runs/tune_shift_tiny",
            }
        )
    return config
