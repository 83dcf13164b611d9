"""experiments/conversations.py on a tiny model: its lines, resumption, and what it refuses."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_runs import ROOT, lines, png_size

from kvjax.core.errors import InputError
from kvjax.core.pytree import same
from kvjax.episodes.memory import Reader, Settings, build
from kvjax.evals.text import load_readable
from kvjax.generate.evict import pack_all

NAMES = ("cases", "session", "bench", "report")
STAMP = {"git": "abc", "device": "cpu"}
run = functools.partial(tiny_runs.run, "conversations")


@pytest.fixture(scope="module")
def modules():
    """The modules of the experiment, by what comes after `conversations_`."""
    names = [f"conversations_{name}" for name in NAMES]
    with tiny_runs.modules("frontier_cases", *names) as (_, *found):
        yield dict(zip(NAMES, found, strict=True))


@pytest.fixture(scope="module")
def config():
    found = tiny_runs.tiny_config("conversations")
    found.model = str(ROOT / found.model)
    return found


@pytest.fixture(scope="module")
def bench(modules, config, tmp_path_factory):
    made = modules["bench"]
    folder = tmp_path_factory.mktemp("conversations")
    return made.Bench(load_readable(config.model), config, folder, STAMP)


@pytest.fixture(scope="module")
def rows(modules, bench):
    cases = [modules["cases"].parse_case(name) for name in bench.config.cases]
    assert bench.run(modules["cases"].made_up("a"), cases) == []
    return lines(bench.path)


def test_a_line_for_every_case_and_code(rows, config):
    found = [(row["case"], row["method"]) for row in rows]
    assert found == [("episodes", "bf16"), ("episodes", "int2"), ("snapkv", "bf16")]
    for row in rows:
        assert row["questions"] == config.questions
        assert row["tokens"] <= config.limit
        assert row["active_bytes"] < row["full_bytes"] / 3
        for scores in row["routes"].values():
            assert len(scores["kl"]) == row["questions"]
            assert all(kl > 1e-4 for kl in scores["kl"])
    exact, coded, single = rows
    assert exact["active_bytes"] == single["active_bytes"] == single["total_bytes"]
    assert exact["total_bytes"] > 1.9 * exact["active_bytes"]
    assert coded["active_bytes"] < exact["active_bytes"] / 2
    full = [row["routes"][next(iter(row["routes"]))]["full_nll"] for row in rows]
    np.testing.assert_allclose(full[1:], [full[0]] * 2, rtol=1e-6)  # one reference for all


def test_bounds_of_routing_bound_it(rows):
    found = {how: np.array(scores["kl"]) for how, scores in rows[0]["routes"].items()}
    assert set(found) == {
        "cosine",
        "dot",
        "segments",
        "likelihood",
        "oracle",
        "hindsight",
        "chance",
    }
    for how in set(found) - {"hindsight"}:
        assert (found["hindsight"] <= found[how] + 1e-12).all()
    other = 2 * found["chance"] - found["hindsight"]  # of two episodes
    for how in set(found) - {"chance"}:
        near = np.minimum(abs(found[how] - found["hindsight"]), abs(found[how] - other))
        assert near.max() < 1e-9


def test_a_rerun_measures_only_what_is_missing(rows, modules, bench, capsys):
    before = bench.path.read_text().splitlines(keepends=True)
    bench.path.write_text("".join(before[:2]) + before[2][:80])  # killed while writing
    cases = [modules["cases"].parse_case(name) for name in bench.config.cases]
    bench.run(modules["cases"].made_up("a"), cases)
    printed = capsys.readouterr().out
    assert "a: 2 of 3 are there" in printed
    assert "episodes" not in printed
    again = modules["bench"].read_rows(bench.path)
    assert [row["case"] for row in again] == ["episodes", "episodes", "snapkv"]
    numbers = [np.array(r["routes"]["only"]["kl"]) for r in (again[2], rows[2])]
    np.testing.assert_allclose(*numbers, rtol=1e-5)
    bench.run(modules["cases"].made_up("a"), cases)
    assert "a: 3 of 3 are there" in capsys.readouterr().out


def test_episodes_are_those_of_a_memory(rows, modules, bench):
    """The caches of the case "episodes" are, bit for bit, those of `episodes.memory.build`."""
    session = modules["session"].Session(bench, modules["cases"].made_up("a"))
    left = session.read(modules["cases"].parse_case("episodes"))
    plan = bench.plan("bf16")
    ours = pack_all(plan, left.eviction, left.sets, room=session.room)
    own = {"episodes": bench.config.episodes, "smooth": 0.3, "room": session.room}
    settings = Settings(left.eviction, **own)
    reader = Reader(bench.model, plan, bench.embedder(), settings)
    memory = build(reader, session.talk.conversation)
    assert memory.episodes == 2
    assert same(jax.device_get(ours), jax.device_get(memory.caches))


def test_tables_and_a_picture(rows, modules):
    report = modules["report"]
    tables = report.print_tables(rows)
    for words in (
        "episodes, segments, int2",
        "snapkv",
        "evidence inside",
        "best single cache",
        "1.3 wanted",
    ):
        assert words in tables
    picture = report.conversations_png(rows)
    assert png_size(picture)[0] == 1600
    assert report.conversations_png([]).startswith(b"\x89PNG")
    assert report.print_tables([]) == ""


def test_questions_of_several_conversations_count_alike(modules):
    scores = lambda *kl: {name: list(kl) for name in ("kl", "nll", "full_nll", "same")}
    shared = dict.fromkeys(modules["report"].SHARED, 1) | {"calibration": None, "method": "bf16"}
    sizes = {"full_bytes": 800, "active_bytes": 200, "total_bytes": 100}
    row = lambda case, talk, *kl: {
        **shared, **sizes, "case": case, "conversation": talk, "routes": {"only": scores(*kl)},
    }  # fmt: skip
    rows = [
        *(row("snapkv", "a", 9.0), row("snapkv", "a", 1.0), row("snapkv", "b", 3.0, 5.0)),
        *(row("tova", "a", 2.0), row("tova", "b", 2.0, 2.0), row("h2o", "a", 0.5)),
    ]
    (group,) = modules["report"].groups(rows)
    found = modules["report"].lines(group)
    assert [(line.case, line.kl.tolist()) for line in found] == [
        ("snapkv", [1.0, 3.0, 5.0]),  # the later line of "a"
        ("tova", [2.0, 2.0, 2.0]),  # and no h2o, which "b" has not got yet
    ]
    assert (found[0].saving, found[0].total) == (4.0, 8.0)
    assert modules["report"].best(found, "single").case == "tova"


def test_names_of_cases(modules):
    parse = modules["cases"].parse_case
    found = parse("episodes/share=0.25/medoids=4/once")
    assert (found.share, found.medoids, found.once, found.smooth) == (0.25, 4, True, 0.3)
    assert parse("known").once
    assert modules["cases"].eviction_of(found, 512, 128).budget == 128
    assert modules["cases"].eviction_of(parse("h2o"), 512, 128).recent == 256
    for name in ("episode", "snapkv/size=3", "snapkv/share=much", "episodes/once=1"):
        with pytest.raises(InputError, match=r"got '"):
            parse(name)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {"config.json", "stamp.json", "metrics.jsonl", "tables.txt", "conversations.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "conversations.png").unlink()
    assert "are there" not in run(tmp_path, "--plot_only").stdout
    assert (tmp_path / "conversations.png").exists()


@pytest.mark.slow
def test_a_conversation_without_answers_is_refused(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_text("Ana: Tea?\nBen: Yes.\n")
    done = run(tmp_path, f"--config.data={path}", "--config.conversations=('talk',)")
    assert done.returncode != 0
    assert "talk: got no question that the first 2 utterances answer" in done.stderr
