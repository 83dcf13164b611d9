"""Config of experiments/vector_search.py; `configs/vector_search.py:tiny` is what CI runs."""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
    """10,240 vectors are 40 whole pages of 256, so that no vector stays exact."""
    config = ConfigDict(
        {
            "data": ("minilm", "clustered-200", "gaussian-200", "clustered-1536", "gaussian-1536"),
            "vectors": 10_240,
            "queries": 500,
            "bits": (1, 2, 3, 4),
            "pq_bits": (4,),  # product quantization is trained for minutes: see the cost
            "page": 256,
            "threads": 1,
            "rounds": 3,
            "pq_rounds": 1,
            "seed": 0,
            "out": "runs/vector_search",
        }
    )
    if variant == "tiny":
        config.update({"data": ("clustered-64",), "vectors": 1024, "queries": 50, "rounds": 1})
        config.bits = (4,)
        config.out = "runs/vector_search_tiny"
    return config
