"""What every test shares: a CPU with eight devices, float32 products in earnest, kept compilations."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported: eight simulated devices for the tests of sharding, the CPU by default, and
# compilers that hurry, since tests compile far longer than they run. Without fusion emitters XLA
# takes half the time; jax 0.11 has no such flag, and ends the process at one that it does not know.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(  # of two values of one flag the last counts: the user's
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
        os.environ.get("XLA_FLAGS", ""),
    ]
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


class FreePrograms:
    """Now and then, forgets compiled programs before their memory maps reach the system's limit.

    Linux gives a process 65,530 maps, and a compiled program takes several: beyond them XLA
    crashes, in whichever test comes next.
    """

    most, every = 30_000, 40

    def __init__(self):
        self.tests = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self):
        self.tests += 1
        maps = Path("/proc/self/maps")
        if self.tests % self.every or not maps.exists():
            return
        if maps.read_bytes().count(b"\n") > self.most:
            jax.clear_caches()


def pytest_configure(config):
    """For doctests too, which lie outside this folder: so a plugin, not a fixture."""
    config.pluginmanager.register(FreePrograms())


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` that optimizes less: for the many small functions that run once or twice."""
    return lambda f, **options: jax.jit(
        f, compiler_options={"xla_backend_optimization_level": 0}, **options
    )


@pytest.fixture(scope="module")
def keep_no_programs():
    """Programs over many devices are compiled anew: keeping one crashed XLA's serialization."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)
