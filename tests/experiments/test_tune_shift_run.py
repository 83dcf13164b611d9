"""experiments/tune_shift.py: its domain, how selection is counted, and a tiny run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_runs

from kvjax.core.errors import InputError
from kvjax.train.tune_shift import Judged


@pytest.fixture(scope="module")
def modules():
    with tiny_runs.modules("tune_shift_domain", "tune_shift_run") as found:
        yield found


def test_questions_for_tests_are_not_those_of_the_training(modules):
    domain, _ = modules
    known = domain.facts(12)
    assert known == domain.facts(12)
    assert known != domain.facts(12, seed=1)
    assert len(known) == 48
    taught, kept = domain.asked(known, (0, 1)), domain.asked(known, (2,))
    assert (len(taught), len(kept)) == (96, 48)
    assert not {p for p, _ in taught} & {p for p, _ in kept}
    assert [a for _, a in kept] == [a for _, a in taught[:48]]
    others = domain.general(24) + domain.general(24, skip=24)
    assert len(set(others)) == 48
    assert not any(ship in prompt for ship, _, _ in known for prompt in others)


def test_how_selection_is_counted(modules):
    _, experiment = modules
    gaps = np.array([5.0, 1.0, 3.0, 9.0])
    judged = Judged(tuple("abcd"), tuple("abcd"), gaps, np.ones(4))
    found = experiment.selection(judged, {"a", "b", "c", "missing"}, 2.0)
    assert found == {"called": 3, "precision": 2 / 3, "recall": 2 / 3}
    assert experiment.selection(judged, set("a"), 99.0)["precision"] == 0.0


def test_a_tiny_run(tmp_path):
    done = tiny_runs.run("tune_shift", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["pair"]["tuned"] < found["pair"]["base"]
    assert found["selection"]["special"] == 4
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == found["expansion"]["prompts"] <= 4
    assert {"config.json", "stamp.json"} <= {path.name for path in tmp_path.iterdir()}


def test_a_config_that_makes_no_sense(modules):
    _, experiment = modules
    config = tiny_runs.tiny_config("tune_shift")
    # No more ships or questions than there are, either.
    for change in ({"ships": 0}, {"seeds": 99}, {"general": 0}, {"ships": 17}, {"rehearsed": 45}):
        wrong = config.copy_and_resolve_references()
        wrong.update(change)
        with pytest.raises(InputError, match="config: got"):
            experiment.run(wrong)
