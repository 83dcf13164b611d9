"""`kvjax lowrank` on a tiny model: a file that a method's name takes, and one line for mistakes."""

import json

import pytest
from memory_model import fails, tiny_model

from kvjax.cli import lowrank
from kvjax.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lowrank")
    tiny_model(place / "model")
    (place / "one.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    (place / "other.txt").write_text("pack my box with five dozen liquor jugs " * 40)
    return place


@pytest.fixture(autouse=True)
def short(place, monkeypatch):
    monkeypatch.setattr(lowrank, "GRADIENT_CONTEXT", 128)
    monkeypatch.setenv("KVJAX_HOME", str(place / "home"))


def arguments(place, out, *more) -> list[str]:
    sample = ["--text", place / "one.txt", "--tokens", 256, "--context", 256, "--gradients", 128]
    argv = ["lowrank", "--model", place / "model", *sample, "--out", out, *more]
    return [str(a) for a in argv]


def test_a_name_takes_what_lowrank_wrote(place, tmp_path, capsys):
    more = "--group-heads", 2, "--multiple", 8, "--rank", 0.75
    assert main(arguments(place, tmp_path / "out", *more)) == 0
    printed = capsys.readouterr().out
    assert "mean, of 16 channels" in printed
    shown = sum(float(word) for word in printed.splitlines()[-2].split()[:2])
    assert shown == pytest.approx(24)  # keys and values share 75 % of 16 each
    name = f"lowrank:{tmp_path / 'out'}"
    argv = ["compare", "--model", place / "model", "--methods", name, "--text", place / "other.txt"]
    argv += ["--context", 256, "--page", 32, "--recent", 32, "--rounds", 0, "--out", tmp_path / "c"]
    assert main([str(a) for a in argv]) == 0
    (row,) = json.loads((tmp_path / "c" / "metrics.json").read_text())["rows"]
    # 24 coordinates of 4 bits, a scale and a zero for 2 heads of 16; positions of pages.
    positions = 32 / (2 * 32 * 16) + 32 / (2 * 2 * 32 * 16)
    assert row["bits_per_value"] == pytest.approx((24 * 4 + 32) / (2 * 16) + positions)
    assert 0 < row["kl"] < 0.1
    seen = [place / "one.txt" if a == place / "other.txt" else a for a in argv]
    assert f"the text of the fit of {name}, one.txt" in fails(main, capsys, *map(str, seen))
    assert "no --model" in fails(main, capsys, "describe", name)


def test_mistakes_end_in_one_line(place, tmp_path, capsys):
    for more, word in [
        (("--rank", 0), "--rank: got 0"),
        (("--bits", 12), "--bits"),
        (("--group-heads", 4), "--group-heads: got 4"),
        (("--search", "best"), "--search"),
        (("--variant", "eigen", "--rank", 0.1), "--rank"),
        (("--gradients", 0), "--gradients"),
        (("--tokens", 100), "--tokens"),
    ]:
        assert word in fails(main, capsys, *arguments(place, tmp_path, *more))
    argv = ["compare", "--model", place / "model", "--text", place / "one.txt", "--methods"]
    assert "no such file" in fails(main, capsys, *argv, f"lowrank:{tmp_path}", "--out", tmp_path)
