"""`describe` and `memory` with a calibration: true bits by layer, and one line for mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from memory_model import tiny_model

from kvjax.cache import cache_bytes
from kvjax.calibrate.artefact import Provenance, load_moments, save_moments
from kvjax.calibrate.drift import drift_summary
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.names import CALIBRATED, get_calibrated
from kvjax.calibrate.served import at_positions
from kvjax.cli import options
from kvjax.cli.main import main
from kvjax.cli.memory import read_config
from kvjax.evals.memory import footprint
from kvjax.generate.plan import init_caches, make_plan
from kvjax.methods import get
from kvjax.methods.describe import layer_kinds, method_bits, ranges
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import load

TINY = Path(__file__).parents[1] / "models" / "tiny" / "qwen3"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint and moments that fit it: layers of which each matters ten times less."""
    place = tmp_path_factory.mktemp("sizes")
    model = load(tiny_model(place / "model"))
    layers, h, d = model.config.layers, model.config.kv_heads, model.config.head_dim
    rng = np.random.default_rng(8200)
    made: dict = {"tokens": 4000, "frequencies": np.full((layers, d // 2), 0.1)}
    for field in dataclasses.fields(Moments):
        if field.name in made or field.default is None:
            continue
        x = rng.normal(size=(layers, h, d, 4 * d)) * np.linspace(0.3, 2, d)[:, None]
        mean = field.name.endswith(("mean", "pre")) and "cov" not in field.name
        made[field.name] = x[..., 0] if mean else x @ x.swapaxes(-1, -2) / (4 * d)
    weight = 10.0 ** -np.arange(layers)[:, None, None, None]
    made |= {"key_fisher": weight * made["query_gram"], "value_fisher": made["value_cov"]}
    about = Provenance("model", "a text", "0", 4000, 48, fingerprint(model.params))
    save_moments(Moments(**made), place / "cal", about)
    save_moments(
        Moments(**{**made, "key_fisher": None, "value_fisher": None}), place / "plain", about
    )
    save_moments(Moments(**made), place / "stale", dataclasses.replace(about, weights="0" * 16))
    return place


def call(capsys, *argv, status: int = 0) -> str:
    assert main([str(a) for a in argv]) == status
    captured = capsys.readouterr()
    if not status:
        return captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("kvjax: ")
    assert "expected" in line
    return line


def test_describe_tells_layers_apart(place, capsys):
    out = call(capsys, "describe", "klt-layers-tiers-2", "--calibration", place / "cal")
    moments = load_moments(place / "cal")[0]
    methods = get_calibrated("klt-layers-tiers-2", moments)
    kinds = layer_kinds(methods)
    assert 1 < len(kinds) <= len(methods)
    assert out.count("\nlayers ") == len(kinds)
    d = moments.shape[2]
    bits = [method_bits(m, d) for m in methods]
    mean = np.mean(bits, 0)
    head = f"klt-layers-tiers-2: {mean.mean():.2f} bits per value (keys {mean[0]:.2f}, values"
    assert out.startswith(head)
    for layers in kinds:
        keys, values = bits[layers[0]]
        row = f"{(keys + values) / 2:6.2f}  {keys:6.2f}  {values:6.2f}  {ranges(layers)}\n"
        assert row in out


def test_describe_a_method_of_one_kind(place, capsys):
    out = call(capsys, "describe", "oscar", "--calibration", place / "cal")
    layers, _, d = load_moments(place / "cal")[0].shape
    assert f"the mean of {layers} layers of 1 kind" in out
    assert out.count("  attention: ") == 1
    assert f"head_dim {d}" in out
    mixed = call(capsys, "describe", "int4/int2", "--calibration", place / "cal")
    assert f"head_dim {d}" in mixed  # that of the model, and no longer 128


def test_describe_lists_what_these_moments_give(place, capsys, monkeypatch):
    few = {name: CALIBRATED[name] for name in ("oscar", "klt-layers-tiers-2")}
    monkeypatch.setattr("kvjax.calibrate.names.CALIBRATED", few)
    monkeypatch.setattr("kvjax.methods.RECIPES", {"int4": None})
    model = ["--model", place / "model"]
    out = call(capsys, "describe", "--calibration", place / "cal", *model).splitlines()
    assert [line.split()[0] for line in out] == ["method", "int4", *few]
    assert "mean of 3 layers; keys " in out[-1]
    out = call(capsys, "describe", "--calibration", place / "plain").splitlines()
    assert out[-1].split()[:3] == ["klt-layers-tiers-2", "-", "-"]
    assert "--gradients" in out[-1]


def test_memory_is_that_of_the_caches(place, capsys):
    names = "klt-layers-tiers-2,oscar,int4"
    argv = ["--methods", names, "--context", 256, "--batch", 2]
    model = ["--model", place / "model", "--calibration", place / "cal"]
    rows = json.loads(call(capsys, "memory", *model, *argv, "--json"))["rows"]
    assert [row["method"] for row in rows] == names.split(",")
    config, moments = load(place / "model").config, load_moments(place / "cal")[0]
    for row in rows[:2]:
        methods = get_calibrated(row["method"], moments)
        plan = make_plan(config, methods)
        caches = init_caches(plan, batch=2, capacity=256)
        assert row["cache_bytes"] == sum(map(cache_bytes, caches))
        held = sum(a.nbytes for a in jax.tree.leaves(caches))
        assert row["cache_bytes"] == held
        # From codecs alone: bits of keys and values, and 4 bytes of position for each page.
        page, d, h = methods[0].layout.page, config.head_dim, config.kv_heads
        bits = [sum(method_bits(m, d)) / 2 + 32 / (2 * page * h * d) for m in methods]
        np.testing.assert_allclose(row["bits_per_value_by_layer"], bits, rtol=1e-9)
        assert row["bits_per_value"] == pytest.approx(np.mean(bits))
        assert row["bytes_per_token"] == pytest.approx(2 * h * d * sum(bits) / 8)
    assert rows[2]["bits_per_value_by_layer"] is None
    table = call(capsys, "memory", *model, *argv)
    low, high = (f(rows[0]["bits_per_value_by_layer"]) for f in (min, max))
    assert f"klt-layers-tiers-2: from {low:.3f} to {high:.3f} bits/value, by layer" in table
    assert "oscar: from" not in table


def test_equal_layers_are_sized_as_one_method():
    config = load(TINY).config
    method, context = get("int4", config.head_dim), config.max_positions
    alike = footprint(config, (method,) * config.layers, context=context, batch=3)
    assert alike == footprint(config, method, context=context, batch=3)
    assert alike.bits_by_layer == (alike.bits_per_value,) * config.layers


def test_other_models_and_weights_are_refused(place, capsys):
    right, tiny = ["--model", place / "model"], ["--model", TINY]
    for command in (["describe", "oscar"], ["memory", "--methods", "oscar", "--context", 64]):
        told = lambda *more, command=command: call(capsys, *command, *more, status=2)
        assert "same checkpoint" in told(*right, "--calibration", place / "stale")
        assert "moments of model: 3 layers" in told(*tiny, "--calibration", place / "cal")
        assert "calibrate again" in told(*right, "--calibration", place / "nowhere")
        assert "kvjax calibrate" in told()  # no calibration


def test_calibrate_ends_with_scales_and_drift(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)
    windows = lambda model, text, context, windows: np.arange(2 * 48).reshape(2, 48) % 90 + 3
    monkeypatch.setattr("kvjax.evals.text.model_windows", windows)
    (tmp_path / "text.txt").write_text("of which nothing is read")
    argv = ["--text", tmp_path / "text.txt", "--tokens", 96, "--context", 48, "--out", tmp_path]
    lines = call(capsys, "calibrate", "--model", place / "model", *argv).splitlines()
    moments = load_moments(tmp_path)[0]
    assert lines[1:3] == drift_summary(moments)
    assert lines[1].startswith("tokens, median over heads: keys of norm ")
    assert lines[2].startswith("drift, median over heads: ")
    assert len(lines) == 4
    assert moments.key_bucket_mean.shape[2] == 8
    longer = [*argv[:-1], tmp_path / "longer", "--positions", 100]
    lines = call(capsys, "calibrate", "--model", place / "model", *longer).splitlines()
    assert lines[0].endswith(", at 100 positions")
    served, about = load_moments(tmp_path / "longer")
    want = at_positions(moments, 48, 100)
    np.testing.assert_allclose(served.key_cov, want.key_cov, rtol=1e-3, atol=1e-5)
    assert (about.context, about.positions, about.reach) == (48, 100, 100)
    assert load_moments(tmp_path)[1].reach == 48
    few = ["calibrate", "--model", place / "model", *argv, "--positions", 47]
    assert "got 47; expected the 48 of --context or more" in call(capsys, *few, status=2)


def test_contexts_beyond_the_calibration_are_told(capsys):
    options.warn_reach(2048, 2048)
    assert not capsys.readouterr().err
    options.warn_reach(2048, 8192)
    assert "up to 2048 positions, and 8192 are served" in capsys.readouterr().err


def test_weights_that_are_elsewhere(place, tmp_path, capsys):
    """A config alone is checked by name and sizes, and that is said."""
    (tmp_path / "model").mkdir()
    shutil.copy(place / "model" / "config.json", tmp_path / "model")
    argv = ["memory", "--methods", "oscar", "--context", 256, "--model", tmp_path / "model"]
    assert main([str(a) for a in [*argv, "--calibration", place / "stale"]]) == 0
    captured = capsys.readouterr()
    assert "not on this machine" in captured.err
    assert "oscar" in captured.out
    assert read_config(str(tmp_path / "model")).name == load(place / "model").config.name


def test_mistakes_end_in_one_line(place, capsys):
    cal = ["--calibration", place / "cal"]
    assert "--head-dim" in call(capsys, "describe", "oscar", *cal, "--head-dim", 128, status=2)
    assert "--head-dim" in call(capsys, "describe", "int4", "--head-dim", 0, status=2)
    assert "klt-layers-tiers-2" in call(capsys, "describe", "klt-9", *cal, status=2)
    assert "klt-layers-tiers-2" in call(capsys, "memory", "--methods", "klt-9", *cal, status=2)
    assert "--calibration" in call(capsys, "describe", "int4", "--model", place, status=2)
    assert "no --model" in call(capsys, "describe", "tuned:x", *cal, status=2)
    assert "--gradients" in call(
        capsys, "describe", "klt-fisher-2", "--calibration", place / "plain", status=2
    )
    # The calibration names a folder of someone's, which no longer says where it is.
    assert "--model: got 'model'" in call(capsys, "memory", "--methods", "oscar", *cal, status=2)
