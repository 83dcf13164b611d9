"""experiments/tokens.py on a tiny model: both parts, resumption, policies and budgets by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import lines, png_size

from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.models.config import known_configs
from kvjax.policies import Probe

CASES = 6  # 4 fidelity, 2 retrieval


@pytest.fixture(scope="module")
def modules():
    """tokens_cases, tokens_tables and tokens_plot."""
    with tiny_runs.modules("tokens_cases", "tokens_tables", "tokens_plot") as found:
        yield found


@pytest.fixture
def config():
    return tiny_runs.tiny_config("tokens")


def run(folder: Path, *options: str) -> str:
    done = tiny_runs.run("tokens", folder, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tokens")
    return folder, run(folder)


@pytest.mark.slow
def test_a_line_for_every_measurement(first):
    folder, printed = first
    rows = lines(folder / "metrics.jsonl")
    assert len(rows) == CASES
    assert f"0 of {CASES} are there" in printed
    found = {(r["policy"], r["method"]): r for r in rows if r["part"] == "fidelity"}
    everything, streamed = found["all", "bf16"], found["streaming", "bf16"]
    assert everything["ratio"] == 1
    assert everything["kl"] < 1e-4 < streamed["kl"]
    assert everything["ratio"] > streamed["ratio"] > 2 * found["streaming", "int2"]["ratio"]
    assert len({row["full_ppl"] for row in found.values()}) == 1
    asked = [row for row in rows if row["part"] == "retrieval"]
    assert [row["method"] for row in asked] == ["bf16", "int2"]
    for row in asked:
        (one,) = row["rows"]
        assert 220 < one["tokens"] <= 256 == row["length"]
        assert row["nll"] == pytest.approx(one["nll"])
    assert asked[0]["nll"] != asked[1]["nll"]


@pytest.mark.slow
def test_what_it_writes(first):
    folder, printed = first
    assert png_size((folder / "pareto.png").read_bytes()) == (1400, 850)
    assert png_size((folder / "retrieval.png").read_bytes())[0] > 600
    tables = (folder / "tables.txt").read_text()
    for words in ("streaming", "kvzip", "bytes/bf16", "passkey", "the question not seen"):
        assert words in tables
        assert words in printed
    assert json.loads((folder / "stamp.json").read_text())["seed"] == 0


@pytest.mark.slow
def test_a_rerun_measures_only_what_is_missing(first):
    folder, _ = first
    before = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(before) if '"streaming"' in line)
    kept = "".join(line for i, line in enumerate(before) if i != gone)
    (folder / "metrics.jsonl").write_text(kept + before[gone][:100])  # killed while writing
    printed = run(folder)
    assert f"{CASES - 1} of {CASES} are there" in printed
    assert "1/1" in printed
    after = (folder / "metrics.jsonl").read_text()
    assert after.startswith(kept)
    again, was = json.loads(after.splitlines()[-1]), json.loads(before[gone])
    assert again["kl"] == pytest.approx(was["kl"], rel=1e-3)
    (folder / "pareto.png").unlink()
    assert "are there" not in run(folder, "--plot_only")
    assert png_size((folder / "pareto.png").read_bytes()) == (1400, 850)


def keep_of(modules, policy: str, budget=512, history=2048, model="smollm2-135m"):
    cases, layout = modules[0], Layout(sink=4, recent=64, page=64)
    case = cases.Case("fidelity", "bf16", policy, budget)
    sizes = {"history": history, "block": 256, "seed": 0}
    return cases.make_keep(case, known_configs()[model], Words(), layout, **sizes)


class Words:
    def encode(self, text, *, bos=True):
        return [1] * bos + [2] * len(text.split())


def test_every_policy_is_an_eviction(modules):
    for name in modules[0].SETUPS:
        made = keep_of(modules, name)
        budgets = made.eviction.budgets
        assert sum(budgets) / len(budgets) == 512
        needs = "probe" in made.eviction.policy.needs
        assert needs == (made.probe is not None) == isinstance(made.eviction.policy, Probe)
    assert keep_of(modules, "h2o").eviction.recent == 256
    assert keep_of(modules, "snapkv", 0.25).eviction.budget == 512
    assert keep_of(modules, "all", None) is None


def test_pyramids_hold_the_windows_in_every_layer(modules):
    budgets = keep_of(modules, "pyramidkv", 200).eviction.budgets
    assert len(budgets) == 30
    assert budgets[0] > 200 > budgets[-1] >= 4 + 127  # sink, and what the ring may hold
    assert sum(budgets) == 30 * 200
    assert len(keep_of(modules, "pyramidkv", model="gemma-3-270m").eviction.budgets) == 3
    with pytest.raises(InputError, match="at least the 131 that always stay"):
        keep_of(modules, "pyramidkv", 100)


def test_names_are_checked_before_anything_is_loaded(modules, config):
    assert len(modules[0].all_cases(config)) == CASES
    for field, value in (
        ("parts", ("speed",)),
        ("policies", ("snap",)),
        ("tasks", ("needle",)),
        ("methods", ("int99",)),
        ("more_methods", ("klt-2",)),  # without a calibration
        ("budgets", (1.5,)),
    ):
        wrong = config.copy_and_resolve_references()
        wrong[field] = value
        with pytest.raises(InputError, match="got "):
            modules[0].all_cases(wrong)


def test_every_setting_decides(modules):
    fields = {field.name for field in dataclasses.fields(modules[0].Case)}
    assert fields <= {"part", *modules[0].SETTINGS}


def test_only_lines_of_the_settings(modules):
    row = {"part": "fidelity", "method": "int2", "policy": "h2o", "n": 0}
    rows = [row | {"seed": seed, "n": seed} for seed in (0, 1)]
    rows += [row | {"seed": 1, "n": 2}, row | {"part": "retrieval"}]
    current = lambda rows, part, **about: [r["n"] for r in modules[1].current(rows, {part: about})]
    assert current(rows, "fidelity", seed=1) == [2]

    # What was measured on another text, at other depths or by another calibration is left out,
    # but for cases that have no part in them.
    row |= {"part": "retrieval", "calibration": None}
    of = lambda n, task, text, *depths: row | {"n": n, "task": task, "text": text, "depths": depths}
    rows = [of(0, "passkey", "a", 0.5), of(1, "passkey", None, 0.5), of(2, "passkey", "a", 0.9)]
    rows += [of(3, "key_value", None, 0.5), of(4, "common_words", None) | {"depths": None}]
    rows += [of(5, "passkey", "a", 0.5) | {"method": "klt-2", "calibration": c} for c in ("x", "y")]
    about = {"text": "a", "depths": (0.5,), "calibration": "x"}
    assert current(rows, "retrieval", **about) == [0, 3, 4, 5]
    assert current(rows, "retrieval", **about | {"text": None}) == [1, 3, 4]


def test_the_front_and_marks_side_by_side(modules):
    rows = [{"ratio": r, "kl": k} for r, k in ((0.3, 0.5), (0.3, 0.4), (0.2, 0.9), (0.6, 0.45))]
    assert [(row["ratio"], row["kl"]) for row in modules[2].front(rows)] == [(0.2, 0.9), (0.3, 0.4)]
    places = modules[2].side_by_side(rows)
    assert places[1] < 0.3 < places[0]  # the better one first
    assert places[0] * places[1] == pytest.approx(0.3**2)
    assert places[2:] == [0.2, 0.6]


def test_pictures_with_and_without_rows(modules):
    assert modules[2].pareto_png([]).startswith(b"\x89PNG")
    every = [
        {"part": "fidelity", "policy": policy, "method": method, "ratio": ratio, "kl": ratio**-2}
        | {"kl_se": 0.1, "layout": (4, 64, 64), "windows": 1, "continuation": 2, "history": 3}
        | {"text": {"about": "a text"}, "model": "m"}
        for i, policy in enumerate(modules[0].SETUPS)
        for method, less in (("bf16", 1), ("int2", 6))
        for ratio in (0.3 / less + 0.01 * i, 0.6 / less + 0.01 * i)
    ]
    assert modules[2].pareto_png(every).startswith(b"\x89PNG")
    looks = [tuple(modules[2]._look(policy).values()) for policy in modules[0].SETUPS]
    assert len({marker for _, marker in looks}) == len(looks)
