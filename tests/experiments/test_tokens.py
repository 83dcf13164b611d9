"""experiments/tokens.py on a tiny model: both parts, resumption, policies and budgets by name."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.models.config import known_configs
from kvjax.policies import Probe

ROOT = Path(__file__).parents[2]
MODULES = ("tokens_cases", "tokens_tables", "tokens_plot")
CASES = 6  # 4 fidelity, 2 retrieval


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules():
    yield [load(name, ROOT / "experiments" / f"{name}.py") for name in MODULES]
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture
def config():
    found = load("tokens_config", ROOT / "configs" / "tokens.py").get_config("tiny")
    del sys.modules["tokens_config"]
    return found


def run(folder: Path, *options: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "experiments/tokens.py", "--config=configs/tokens.py:tiny"),
            *(f"--config.out={folder}", *options),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("tokens")
    return folder, run(folder)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.mark.slow
def test_a_line_for_every_measurement(first):
    folder, printed = first
    rows = lines(folder)
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
    assert png_size(folder / "pareto.png") == (1400, 850)
    assert png_size(folder / "retrieval.png")[0] > 600
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
    assert png_size(folder / "pareto.png") == (1400, 850)


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
    rows = [{"part": "fidelity", "seed": seed, "policy": "h2o", "n": seed} for seed in (0, 1)]
    rows += [{"part": "fidelity", "seed": 1, "policy": "h2o", "n": 2}, {"part": "retrieval"}]
    assert [row["n"] for row in modules[1].current(rows, {"fidelity": {"seed": 1}})] == [2]


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
