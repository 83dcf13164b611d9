"""Programs over many devices are compiled anew: keeping one of them crashed XLA's serialization."""

import jax
import pytest


@pytest.fixture
def keep_no_programs():
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)
