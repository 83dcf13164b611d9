"""Published names as recipes: functions that build values of the algebra."""

from kvjax.methods.hadamard_int import hadamard_int
from kvjax.methods.kivi import kivi
from kvjax.methods.naive import bf16, integer
from kvjax.methods.names import RECIPES, get
from kvjax.methods.qjl import qjl
from kvjax.methods.turboquant import turboquant

__all__ = ["RECIPES", "bf16", "get", "hadamard_int", "integer", "kivi", "qjl", "turboquant"]
