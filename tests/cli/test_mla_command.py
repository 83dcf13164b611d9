"""`kvjax mla` on a tiny model: a folder that `load` reads, and one line for mistakes."""

import jax.numpy as jnp
import numpy as np
import pytest
from memory_model import TINY, fails, tiny_model

from kvjax.cli.main import main
from kvjax.models.causal import forward
from kvjax.models.load import load


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("mla")
    tiny_model(place / "model")
    (place / "text.txt").write_text("pack my box with five dozen liquor jugs " * 10)
    return place


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(place / "home"))


def arguments(place, out, rank, heads, *more) -> list[str]:
    argv = ["mla", "--model", place / "model", "--text", place / "text.txt", "--context", 64]
    argv += ["--windows", 2, "--out", out, "--rank", rank, "--rope-heads", heads, *more]
    return [str(a) for a in argv]


def test_a_folder_that_is_the_model(place, tmp_path, capsys):
    """All rotary heads and all values: nothing is lost but rounding."""
    assert main(arguments(place, tmp_path / "out", 32, 2)) == 0
    printed = capsys.readouterr().out.splitlines()[0]
    assert printed.startswith("model: 384 -> 384 bytes per token (bf16), KL ")
    assert printed.endswith(" nats on 64 tokens not calibrated on")
    assert abs(float(printed.split("KL ")[1].split()[0])) < 1e-5
    plain, made = (load(folder) for folder in (place / "model", tmp_path / "out"))
    text = "sphinx of black quartz"
    ids = [one.tokenizer.encode(text) for one in (plain, made) if one.tokenizer is not None]
    assert ids[0] == ids[1]
    want, got = (forward(one.params, one.config, jnp.asarray(ids[:1])) for one in (plain, made))
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_mistakes_end_in_one_line(place, tmp_path, capsys):
    new, taken = tmp_path / "new", tmp_path / "taken"
    taken.write_text("")
    wrong = lambda *a: fails(main, capsys, *arguments(place, *a))
    assert "expected a new folder" in wrong(taken, 8, 1)
    assert "expected a new folder" in wrong(taken / "below", 8, 1)
    assert "rank: got 0; expected 1 to 48" in wrong(new, 0, 1)
    assert "rope_heads: got 3; expected 1 to the 2 KV heads" in wrong(new, 8, 3)
    assert "--context: got 0" in wrong(new, 8, 1, "--context", 0)
    gemma = TINY.parent / "gemma3"
    assert "got qk_norm, windows, arch gemma3" in wrong(new, 8, 1, "--model", gemma)
    assert not new.exists()
