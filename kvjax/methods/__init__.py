"""Published names as recipes: functions that build values of the algebra."""

from kvjax.methods.e8 import e8
from kvjax.methods.eden import eden
from kvjax.methods.floats import fp8, mxfp4, nvfp4
from kvjax.methods.gear import gear
from kvjax.methods.hadamard_int import hadamard_int
from kvjax.methods.kivi import kivi
from kvjax.methods.naive import bf16, integer
from kvjax.methods.names import RECIPES, get
from kvjax.methods.oscar import oscar
from kvjax.methods.oscar_canalized import oscar_canalized
from kvjax.methods.polarquant import polarquant, polarquant_pairs
from kvjax.methods.qjl import qjl
from kvjax.methods.quarot import quarot
from kvjax.methods.rabitq import rabitq
from kvjax.methods.released import (
    turboquant_kv_released,
    turboquant_prod_released,
    vllm_turboquant,
)
from kvjax.methods.trellis import trellis
from kvjax.methods.turboquant import turboquant

__all__ = [
    "RECIPES",
    "bf16",
    "e8",
    "eden",
    "fp8",
    "gear",
    "get",
    "hadamard_int",
    "integer",
    "kivi",
    "mxfp4",
    "nvfp4",
    "oscar",
    "oscar_canalized",
    "polarquant",
    "polarquant_pairs",
    "qjl",
    "quarot",
    "rabitq",
    "trellis",
    "turboquant",
    "turboquant_kv_released",
    "turboquant_prod_released",
    "vllm_turboquant",
]
