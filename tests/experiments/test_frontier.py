"""experiments/frontier.py on a tiny model: all parts, resumption, and texts that must differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import lines, png_size

from kvjax.core.errors import InputError

ROW = {
    "part", "model", "method", "calibration", "text", "seed", "layout", "bits_per_value",
    "bits_per_value_total", "kl", "kl_se", "kl_windows", "ppl", "full_ppl", "top1", "logit_db",
    "seconds", "git", "device",
}  # fmt: skip
CASES = 13  # 4 frontier, 6 transfer, 2 seeds, 1 positions


@pytest.fixture(scope="module")
def modules():
    """frontier_cases, frontier_tables and frontier_plot."""
    with tiny_runs.modules("frontier_cases", "frontier_tables", "frontier_plot") as found:
        yield found


@pytest.fixture
def config():
    return tiny_runs.tiny_config("frontier")


def run(folder: Path, *options: str) -> str:
    done = tiny_runs.run("frontier", folder, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("frontier")
    return folder, run(folder)


@pytest.mark.slow
def test_a_line_for_every_measurement(first):
    folder, printed = first
    rows = lines(folder / "metrics.jsonl")
    assert len(rows) == CASES
    assert f"0 of {CASES} are there" in printed
    for row in rows:
        assert set(row) >= ROW
        assert 0 < row["kl_se"] < row["kl"]
        assert row["bits_per_value_total"] > row["bits_per_value"] > 2
        assert (row["calibration"] is None) == (row["method"] == "turboquant-2")
        if row["calibration"]:
            assert row["calibration"]["about"] != row["text"]["about"]
    pairs = {(r["calibration"]["text"], r["text"]["text"]) for r in rows if r["part"] == "transfer"}
    assert len(pairs) == 6
    (positions,) = [row for row in rows if row["part"] == "positions"]
    parts = positions["kl_by_position"]
    assert [part["start"] for part in parts] == [0, 32, 64, 96]
    counts = [32, 32, 32, 31]  # the last token has no next one
    mean = sum(n * part["kl"] for n, part in zip(counts, parts, strict=True)) / 127
    assert mean == pytest.approx(positions["kl"], rel=1e-5)


@pytest.mark.slow
def test_what_it_writes(first):
    folder, printed = first
    names = {"config.json", "stamp.json", "metrics.jsonl", "tables.txt", "frontier.png"}
    assert names <= {path.name for path in folder.iterdir()}
    assert len(list(folder.glob("calibration/*/moments.safetensors"))) == 3
    assert png_size((folder / "frontier.png").read_bytes())[0] == 1600
    tables = (folder / "tables.txt").read_text()
    for words in ("turboquant-2", "calibrated on", "KL over seeds", "KL by position"):
        assert words in tables
        assert words in printed


@pytest.mark.slow
def test_a_rerun_measures_only_what_is_missing(first):
    folder, _ = first
    before = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    gone = [i for i, line in enumerate(before) if '"part": "transfer"' in line][:2]
    kept = "".join(line for i, line in enumerate(before) if i not in gone)
    (folder / "metrics.jsonl").write_text(kept + before[gone[1]][:100])  # killed while writing
    printed = run(folder)
    assert f"{CASES - 2} of {CASES} are there" in printed
    assert "2/2" in printed
    assert "calibrating" not in printed
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(kept)
    assert after.count('"part"') == CASES + 1
    rows = [json.loads(line) for line in after.splitlines()[CASES - 1 :]]
    old = [json.loads(before[i]) for i in gone]
    for row, was in zip(rows, old, strict=True):
        assert row["kl"] == pytest.approx(was["kl"], rel=1e-3)


@pytest.mark.slow
def test_only_the_picture(first):
    folder, _ = first
    (folder / "frontier.png").unlink()
    assert "are there" not in run(folder, "--plot_only")
    assert png_size((folder / "frontier.png").read_bytes())[0] == 1600


def test_the_text_of_the_calibration_is_no_test(modules, config, tmp_path):
    cases = modules[0]
    words = [f"The word number {i} of this text is {i * i}." for i in range(400)]
    for name, part in (("a", words), ("b", words[::-1]), ("part", words[100:200])):
        (tmp_path / name).write_text(" ".join(part))
    made = lambda *names: cases.read_texts([f"{n}={tmp_path / n.strip('_')}" for n in names])
    texts = made("a", "b")
    found = cases.all_cases(config, texts)
    assert all(case.calibration != case.text for case in found)
    assert {case.part for case in found} == set(cases.PARTS)
    with pytest.raises(InputError, match="the text of the calibration, a"):
        cases.check_apart(texts["a"], texts["a"])
    for names in (("a", "_a"), ("a", "part"), ("part", "a")):
        with pytest.raises(InputError, match="expected another text"):
            cases.all_cases(config, made(*names))


@pytest.mark.parametrize("given", [("a", "docstrings"), ("docstrings",), ("code", "code")])
def test_texts_that_do_not_do(modules, given):
    with pytest.raises(InputError, match="texts: got"):
        modules[0].read_texts(given)


def test_names_are_checked_before_anything_is_loaded(modules, config):
    texts = {name: modules[0].Text(name, name, name * 200) for name in "xy"}
    for field, value in (("methods", ("klt-9",)), ("parts", ("front",))):
        with config.unlocked():
            wrong = config.copy_and_resolve_references()
            wrong[field] = value
        with pytest.raises(InputError, match=r"klt-9|front"):
            modules[0].all_cases(wrong, texts)


def test_an_unfinished_line_is_none(modules, tmp_path):
    cases, path = modules[0], tmp_path / "metrics.jsonl"
    assert cases.read_rows(path) == []
    cases.append_row(path, {"a": 1})
    path.write_text(path.read_text() + '{"b": ')
    cases.append_row(path, {"c": 2})
    assert cases.read_rows(path) == [{"a": 1}, {"c": 2}]


def test_every_setting_decides(modules):
    case = modules[0].Case("seeds", "klt-2", "a", "b", 0, None, 128, 1)
    kept = {field.name for field in dataclasses.fields(case)} - {"part"}
    assert kept <= set(modules[0].SETTINGS)


def test_means_over_texts(modules):
    sizes = dict.fromkeys(modules[1].SIZES, 2.0)
    other = {"top1": 0.5, "logit_db": None, "attention_error": 0.1, "full_ppl": 9.0}
    rows = [
        {"method": "m", "kl": kl, "kl_se": se, "ppl": ppl, "text": {"text": t}} | sizes | other
        for kl, se, ppl, t in ((0.1, 0.03, 4.0, "a"), (0.3, 0.04, 9.0, "b"))
    ]
    (mean,) = modules[1].over_texts(rows)
    assert mean["kl"] == pytest.approx(0.2)
    assert mean["kl_se"] == pytest.approx(0.025)
    assert mean["ppl"] == pytest.approx(6.0)
    assert mean["logit_db"] is None
    assert mean["texts"] == ["a", "b"]


def test_a_picture_without_rows(modules):
    assert modules[2].frontier_png([]).startswith(b"\x89PNG")
