"""The README's code runs, and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import kvjax
from kvjax.models import hub

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_library_examples():
    scope: dict = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in BLOCKS:
            if "load(" not in block:
                exec(block, scope)
    assert out.getvalue().startswith("(1, 2, 4, 64) 1001 14\n")
    described = kvjax.describe(scope["method"], head_dim=64)
    assert described.startswith("half: 8.00 bits per value")


@pytest.mark.model
def test_the_example_on_a_real_model(capsys):
    if hub.installed(hub.find("smollm2-135m")) is None:
        pytest.skip("not fetched: run `kvjax models fetch smollm2-135m`")
    scope: dict = {}
    exec("import kvjax\n" + next(block for block in BLOCKS if "load(" in block), scope)
    assert len(capsys.readouterr().out.split()) > 10
