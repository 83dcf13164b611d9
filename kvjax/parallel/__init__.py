"""One mesh, one set of rules: the same decode step on one device or many."""

from kvjax.parallel.place import place_params
from kvjax.parallel.processes import fetch, start, start_from_environment
from kvjax.parallel.rules import AXES, ShardingRules, make_mesh

__all__ = [
    "AXES",
    "ShardingRules",
    "fetch",
    "make_mesh",
    "place_params",
    "start",
    "start_from_environment",
]
