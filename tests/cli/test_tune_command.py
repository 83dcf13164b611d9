"""`kvjax tune` on a tiny model: a file that a method's name takes, and one line for mistakes."""

import json

import jax
import pytest
from memory_model import fails, tiny_model

from kvjax.calibrate.artefact import load_moments
from kvjax.calibrate.names import get_for_model
from kvjax.cli import calibrate, tune
from kvjax.cli.main import main
from kvjax.methods.describe import code_bits
from kvjax.models.load import load


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint, two texts, a calibration."""
    place = tmp_path_factory.mktemp("tune")
    tiny_model(place / "model")
    (place / "one.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    (place / "other.txt").write_text("pack my box with five dozen liquor jugs " * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "GRADIENT_CONTEXT", 256)
        patch.setenv("KVJAX_HOME", str(place / "home"))
        more = ["--tokens", 512, "--context", 256, "--gradients", 512, "--out", place / "moments"]
        text = ["--text", place / "one.txt"]
        assert call("calibrate", "--model", place / "model", *text, *more) == 0
    return place


def call(*argv) -> int:
    return main([str(a) for a in argv])


def tuned(place, out, *more) -> int:
    argv = ["--model", place / "model", "--calibration", place / "moments"]
    return call("tune", *argv, "--text", place / "other.txt", "--steps", 3, "--out", out, *more)


@pytest.fixture(autouse=True)
def short(place, monkeypatch):
    monkeypatch.setattr(tune, "CONTEXT", 128)
    monkeypatch.setenv("KVJAX_HOME", str(place / "home"))


def test_a_name_takes_what_tune_wrote(place, tmp_path, capsys):
    assert tuned(place, tmp_path / "out", "--tokens", 256) == 0
    assert "klt-fisher-2: loss" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert facts["tokens"] == 256
    assert facts["steps"] == 3
    assert sum(after for _, after in facts["losses"]) < sum(before for before, _ in facts["losses"])
    name = f"tuned:{tmp_path / 'out'}"
    model = load(place / "model")
    moments, _ = load_moments(place / "moments", model.config, model.params)
    names = "klt-fisher-2", name
    plain, better = (get_for_model(n, model.config, moments) for n in names)
    assert [m.name for m in better] == [name] * model.config.layers
    bits = lambda methods: [code_bits(m.key, model.config.head_dim, 64) for m in methods]
    assert bits(better) == bits(plain)
    arrays = [jax.tree.leaves([m.key for m in methods]) for methods in (plain, better)]
    assert [a.shape for a in arrays[0]] == [a.shape for a in arrays[1]]
    assert any((a != b).any() for a, b in zip(*arrays, strict=True))
    argv = ["compare", "--model", place / "model", "--calibration", place / "moments"]
    argv += ["--methods", name, "--out", tmp_path / "compare", "--text"]
    assert "the text of the calibration, one" in fails(main, capsys, *argv, place / "one.txt")
    seen = f"the text of the fit of {name}, other.txt"
    assert seen in fails(main, capsys, *argv, place / "other.txt")


def test_mistakes_end_in_one_line(place, tmp_path, capsys):
    for more, word in [
        (("--tokens", 100), "--tokens"),
        (("--steps", 0), "--steps"),
        (("--calibration", tmp_path), "calibrate again"),
    ]:
        assert tuned(place, tmp_path, *more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("kvjax: ")
        assert word in error
