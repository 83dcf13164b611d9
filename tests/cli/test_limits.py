"""`kvjax limits` on a tiny model: its table, its files, and one clear line for wrong inputs."""

import json
import shutil

import numpy as np
import pytest
from memory_model import fails, tiny_model
from safetensors.numpy import load_file, save_file

from kvjax.cli.main import main
from kvjax.evals.text import same_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts: one to calibrate on, one to test on."""
    place = tmp_path_factory.mktemp("texts")
    one, other = place / "one.txt", place / "other.txt"
    one.write_text("the quick brown fox jumps over the lazy dog " * 40, encoding="utf-8")
    other.write_text("pack my box with five dozen liquor jugs " * 40, encoding="utf-8")
    return one, other


@pytest.fixture(scope="module")
def calibration(folder, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    argv = ["calibrate", "--model", folder, "--text", texts[0], "--tokens", 512, "--context", 256]
    assert main([str(a) for a in [*argv, "--out", out]]) == 0
    return out


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))


def limits(folder, calibration, text, out, *more) -> int:
    argv = ["limits", "--model", folder, "--calibration", calibration, "--text", text]
    return main([str(a) for a in [*argv, "--context", 128, "--out", out, *more]])


def test_it_prints_a_table_and_writes_what_is_in_it(folder, calibration, texts, tmp_path, capsys):
    methods = "turboquant-2,centred-2,klt-lloyd-max-2,kivi-2/int4"
    more = ("--methods", methods, "--windows", "2", "--heads", "--seed", "5")
    assert limits(folder, calibration, texts[1], tmp_path, *more) == 0
    captured = capsys.readouterr()
    assert "the calibration saw this text" not in captured.err
    for word in ["measured", "predicted", "to bound", *methods.split(",")]:
        assert word in captured.out
    metrics = json.loads((tmp_path / "limits.json").read_text())
    assert metrics["stamp"]["seed"] == 5
    assert [row["method"] for row in metrics["rows"]] == methods.split(",")
    shape = np.shape(metrics["bound"])
    assert shape == (3, 2)
    for row in metrics["rows"]:
        assert np.shape(row["measured"]) == shape
        known = row["method"] != "kivi-2/int4"
        assert (row["predicted"] is not None) == known
        if known:
            assert np.shape(row["predicted"]) == np.shape(row["known_text"]) == shape
    bits = [row["key_bits"] for row in metrics["rows"]]  # a length of 16 bits for 16 values
    assert bits[0] == pytest.approx(3.0)
    assert bits[1] == pytest.approx(3.0 + 32 / (64 * 16))  # and a position per page
    last = next(line for line in captured.out.splitlines() if line.split()[:1] == ["kivi-2/int4"])
    assert last.split()[2:4] == ["-", "-"]
    assert (tmp_path / "limits.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_text_of_the_calibration_is_told(folder, calibration, texts, tmp_path, capsys):
    more = ("--methods", "int4", "--layers")
    assert limits(folder, calibration, texts[0], tmp_path, *more) == 0
    assert "the calibration saw this text, one.txt" in capsys.readouterr().err
    assert same_text("a.txt (sha256 12)", "b.txt (sha256 12)")
    assert not same_text("a.txt (sha256 12)", "a.txt (sha256 13)")
    assert same_text("a.txt", "a.txt (sha256 13)")


def test_a_calibration_of_other_weights_is_refused(folder, calibration, texts, tmp_path, capsys):
    other = tmp_path / "tiny"
    shutil.copytree(folder, other)
    for path in other.glob("*.safetensors"):
        doubled = {name: 2 * a for name, a in load_file(path).items()}
        save_file(doubled, path, metadata={"format": "pt"})
    argv = ["limits", "--model", other, "--calibration", calibration, "--text", texts[1]]
    assert "same checkpoint" in fails(main, capsys, *argv, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--bits", "5"), "--bits: got 5; expected 2, 3 or 4"),
        (("--methods", "klt-9"), "centred-2"),
        (("--methods", ","), "--methods: got no names"),
        (("--windows", "0"), "--windows"),
        (("--context", "100000"), "positions"),
        (("--calibration", "nowhere"), "kvjax calibrate"),
    ],
)
def test_mistakes_end_in_one_line(more, error, folder, calibration, texts, tmp_path, capsys):
    assert limits(folder, calibration, texts[1], tmp_path / "out", *more) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.endswith(" ...")]
    assert len(lines) == 1, lines
    assert error in lines[0]
    assert not (tmp_path / "out" / "limits.json").exists()
