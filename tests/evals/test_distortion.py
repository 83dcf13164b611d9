"""The measures of `kvjax distortion` against exact answers, and the command as a user meets it."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cli.main import main
from kvjax.codecs import QJL, Codebook, Normalized, Residual
from kvjax.core.errors import InputError
from kvjax.evals.distortion import Row, errors, gap_db, index_entropy, measure
from kvjax.evals.distortion_plot import gap_png
from kvjax.evals.distortion_run import Settings, run_distortion
from kvjax.evals.vectors import KINDS, Vectors, of_model, synthetic
from kvjax.models import hub
from kvjax.models.load import load


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(7000 + seed).normal(size=shape).astype(np.float32)


def test_errors_of_what_is_only_too_short():
    """x_hat = a x: slope a, and both errors (1 - a)^2 on average over directions."""
    x, q = numbers(3, 16, 8, seed=1), numbers(3, 4096, 8, seed=2)
    found = errors(x, 0.75 * x, q)
    assert found["slope"] == pytest.approx(0.75, rel=1e-6)
    assert found["mse"] == pytest.approx(0.0625, rel=1e-6)
    assert found["ip_error"] == pytest.approx(0.0625, rel=0.05)


def test_ip_error_sees_what_the_queries_look_at():
    x, q = numbers(2, 16, 8, seed=3), numbers(2, 64, 8, seed=4)
    x_hat, q[..., :4] = x.copy(), 0
    x_hat[..., :4] += 1  # wrong where no query looks
    found = errors(x, x_hat, q)
    assert found["mse"] > 0.3
    assert found["ip_error"] == pytest.approx(0, abs=1e-12)
    assert found["slope"] == pytest.approx(1)


def test_gap_is_zero_on_the_bound():
    for bits in (1, 2.125, 5):
        assert gap_db(4.0**-bits, bits) == pytest.approx(0, abs=1e-12)
        assert gap_db(2 * 4.0**-bits, bits) == pytest.approx(3.0103, abs=1e-4)
    assert gap_db(0.0, 16) == -math.inf


# Entropy of Lloyd-Max indices on unit vectors of 128 channels (turboquant fact sheet, 1.3).
ENTROPY = {1: 1.0, 2: 1.9145, 3: 2.8316, 4: 3.7748, 5: 4.7433}


@pytest.mark.parametrize("bits", ENTROPY)
def test_entropy_of_lloyd_max_indices(bits):
    x = synthetic("sphere", 8, 64, 128, seed=5).x
    codec = Normalized(Codebook.lloyd_max(128, bits))
    assert index_entropy(codec, codec.encode(x), 128) == pytest.approx(ENTROPY[bits], rel=3e-3)


def test_entropy_counts_every_leaf():
    x = synthetic("sphere", 4, 64, 64, seed=6).x
    sketch = QJL(numbers(64, 64, seed=7))
    codec = Residual(Normalized(Codebook.lloyd_max(64, 2)), sketch)
    assert index_entropy(codec, codec.encode(x), 64) == pytest.approx(1.915 + 1, abs=0.01)
    dense = kvjax.methods.get("bf16", 64).key
    assert index_entropy(dense, dense.encode(x), 64) is None


def test_a_row_is_the_published_number():
    data = [synthetic(kind, 32, 64, 128, seed=8) for kind in KINDS]
    codec = kvjax.methods.get("turboquant-3", 128).key
    rows = list(measure("turboquant-3", codec, data, repeats=0))
    assert [row.data for row in rows] == list(KINDS)
    assert {row.bits_per_value for row in rows} == {3 + 16 / 128}
    assert rows[0].mse == pytest.approx(0.033966, rel=0.02)
    assert rows[0].ip_error == pytest.approx(0.034, rel=0.04)
    assert rows[0].slope == pytest.approx(1 - 0.034, abs=0.005)
    assert rows[0].encode is None


# At 2 bits of code, d = 128, decibels above the bound at the true 2.125 bits; the published order.
def test_order_at_two_bits():
    data = [synthetic("sphere", 8, 64, 128, seed=9)]
    names = ("trellis-2", "e8-2", "turboquant-2", "turboquant-prod-2")
    gaps = []
    for name in names:
        (row,) = measure(name, kvjax.methods.get(name, 128).key, data, repeats=0)
        gaps.append(row.gap_db)
    expected = [10 * math.log10(mse * 16) for mse in (0.0700, 0.0894, 0.1160, 0.558)]
    extra = [10 * math.log10(4) * 16 / 128] * 3 + [10 * math.log10(4) * 32 / 128]
    np.testing.assert_allclose(gaps, np.add(expected, extra), atol=0.25)


# The best unbiased code against the paper's at equal bits, d * Var (the issue's own ratio).
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unbiased_variance_is_a_quarter_of_the_papers(bits):
    data = [synthetic("sphere", 32, 64, 128, seed=10 + bits)]
    rows = {}
    for name in (f"turboquant-prod-{bits}", f"eden-search-{bits}"):
        (rows[name],) = measure(name, kvjax.methods.get(name, 128).key, data, repeats=0)
    paper, ours = rows.values()
    assert ours.slope == pytest.approx(1, abs=0.004)
    assert ours.bits_per_value < paper.bits_per_value
    assert ours.ip_error <= 0.25 * paper.ip_error


def test_vectors_are_what_they_say():
    for kind in KINDS:
        a, b = (synthetic(kind, 2, 64, 32, seed=seed) for seed in (0, 1))
        assert a.x.shape == (2, 64, 32)
        assert not np.allclose(a.x, b.x)
        np.testing.assert_array_equal(a.x, synthetic(kind, 2, 64, 32, seed=0).x)
        np.testing.assert_allclose(np.linalg.norm(a.q, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(synthetic("sphere", 2, 64, 32, seed=0).x, axis=-1), 1, rtol=1e-5
    )
    energy = np.asarray(synthetic("outliers", 8, 64, 64, seed=0).x ** 2).mean((0, 1))
    assert (energy > 100).sum() == 2
    with pytest.raises(InputError, match="sphere"):
        synthetic("ball", 1, 16, 8, seed=0)


def test_a_codec_that_is_exact_has_no_gap_in_json():
    x = numbers(2, 16, 8, seed=20)
    data = [Vectors(jax.numpy.asarray(x), jax.numpy.asarray(x), "exact")]
    (row,) = measure("exact", kvjax.codecs.Dense("float32"), data, repeats=1)
    assert row.mse == 0
    assert row.as_dict()["gap_db"] is None
    assert row.encode > 0
    assert row.decode > 0
    json.dumps(row.as_dict(), allow_nan=False)


def test_what_does_not_fit_is_left_out_with_its_reason():
    settings = Settings(("e8-2", "turboquant-2"), dims=(20,), values=2048, repeats=0)
    result = run_distortion(settings, progress=lambda message: None)
    assert [row.codec for row in result.rows] == ["turboquant-2"]
    ((name, d, reason),) = result.left_out
    assert (name, d) == ("e8-2", 20)
    assert "multiple of 8" in reason
    with pytest.raises(InputError, match="multiple of 8"):
        run_distortion(Settings(("e8-2",), dims=(20,), repeats=0), progress=lambda message: None)


def test_the_plot_takes_any_rows():
    row = Row("made up 3", "$x$ of \N{SNOWMAN}", 8, 3.0, 0.1, 0.1, 1.0, 99.0, None)
    assert gap_png([row])[:8] == b"\x89PNG\r\n\x1a\n"


def test_command(tmp_path, capsys):
    out = tmp_path / "made"
    status = main(
        [
            *("distortion", "--methods", "turboquant-2,int2", "--dims", "32", "--data", "sphere"),
            *("--values", "4096", "--out", str(out)),
        ]
    )
    assert status == 0
    metrics = json.loads((out / "metrics.json").read_text())
    asked = {"codec", "data", "d", "bits_per_value", "mse", "ip_error", "slope", "gap_db"}
    assert all(asked <= set(row) for row in metrics["rows"])
    assert [row["codec"] for row in metrics["rows"]] == ["turboquant-2", "int2"]
    assert metrics["stamp"]["command"].startswith("kvjax ")
    assert {p.name for p in out.iterdir()} == {"metrics.json", "gap.png"}
    assert "turboquant-2" in capsys.readouterr().out


BAD = {
    "--methods nonsense": "turboquant-2",
    "--methods ,": "--methods",
    "--dims 12x": "--dims",
    "--dims 0": "--dims",
    "--data ball": "sphere",
    "--values 0": "--values",
    "--page 0": "--page",
    "--dims 20 --methods e8-2": "multiple of 8",
    "--data , --methods int2": "no vectors",
    "--page 3 --methods int2": "page",
}


@pytest.mark.parametrize("words", BAD)
def test_mistakes_end_in_one_line(words, tmp_path, capsys):
    status = main(["distortion", *words.split(), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert error.startswith("kvjax: ")
    assert BAD[words] in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.model
def test_keys_and_values_of_a_model():
    if hub.installed(hub.find("smollm2-135m")) is None:
        pytest.skip("not fetched: run `kvjax models fetch smollm2-135m`")
    smollm2 = load("smollm2-135m")
    text = "Compression keeps what attention looks at. " * 200
    keys, values = of_model(smollm2, text, pages=4, page=16)
    assert keys.x.shape == values.x.shape == (4, 16, smollm2.config.head_dim)
    assert keys.name == f"{smollm2.config.name} keys"
    assert not np.allclose(keys.x, values.x)
    with pytest.raises(InputError, match="tokens"):
        of_model(smollm2, "Too short.", pages=4, page=16)
