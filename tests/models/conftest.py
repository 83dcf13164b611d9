"""Fixtures of the model tests: tiny checkpoints with expected logits, and real models if fetched."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.models import hub
from kvjax.models.load import Model, load

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _exact_matmul():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session", params=("smollm2-135m", "gemma-3-270m"))
def real(request) -> tuple[str, Model]:
    """A fetched model and the short name of its reference files."""
    if hub.installed(hub.find(request.param)) is None:
        pytest.skip(f"not fetched: run `kvjax models fetch {request.param}`")
    short = {"smollm2-135m": "smollm2", "gemma-3-270m": "gemma3"}[request.param]
    return short, load(request.param, dtype="float32")


@pytest.fixture
def golden(real):
    with np.load(HERE / "golden" / f"{real[0]}_64.npz") as data:
        return dict(data)
