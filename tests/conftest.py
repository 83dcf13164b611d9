"""What every test shares: a CPU with eight devices, float32 products in earnest, kept compilations."""

from __future__ import annotations

import os
from pathlib import Path

# Before jax is imported: eight simulated devices for the tests of sharding, the CPU by default.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

# Two workers share the cores: a rotation's QR by threads that wait for each other takes 0.7 s
# instead of 1 ms.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is what tests spend their time on: keep all of it, in an ignored folder of the repo.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples on every run, and no deadline: the first example of a shape compiles.
settings.register_profile("kvjax", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("kvjax")


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that optimizes less: for the many small functions that run once or twice."""
    return lambda f, **options: jax.jit(
        f, compiler_options={"xla_backend_optimization_level": 0}, **options
    )
