"""`kvjax episodes build | ask | show` on a tiny model: files in, answers out, and mistakes told."""

from __future__ import annotations

import json

import pytest
from memory_model import OWN, SMALL, fails, tiny_model

from kvjax.cli.main import main
from kvjax.episodes.store import peek

TALK = "# 1 May\n" + "".join(
    f"{'Ana' if i % 2 else 'Ben'}: {'tea and cake' if i < 12 else 'the dog in the park'} {i}\n"
    for i in range(24)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a file, and a memory of it."""
    place = tmp_path_factory.mktemp("episodes")
    tiny_model(place / "tiny")
    (place / "talk.txt").write_text(TALK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVJAX_HOME", str(place / "home"))
        patch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)
        assert main(build(place, place / "memory", "--room", "320")) == 0
    return place


def build(place, memory, *more, file="talk.txt") -> list[str]:
    argv = ["episodes", "build", place / file, "--memory", memory, "--model", place / "tiny"]
    return [str(a) for a in (*argv, *OWN, *SMALL, "--episodes", 2, *more)]


@pytest.fixture(autouse=True)
def home(place, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(place / "home"))
    monkeypatch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)


def files(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_show_needs_no_model(place, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("loads a model")

    monkeypatch.setattr("kvjax.models.load.load", never)
    assert main(["episodes", "show", str(place / "memory")]) == 0
    out = capsys.readouterr().out
    assert "talk: 24 turns, 1 May" in out
    assert "epicache with 96 tokens per head" in out
    rows = [line for line in out.splitlines() if "segments" in line]
    assert sorted(int(row.split()[1]) for row in rows) == [3, 3]
    assert sum("tea and cake" in row for row in rows) == 1
    memory, facts = peek(place / "memory")
    full = facts["settings"]["tokens"] * facts["bytes_per_token"]
    assert facts["settings"]["tokens"] == memory.read
    assert f"times the {full / 2**20:.2f} MiB of all tokens in bf16" in out
    assert f"caches {facts['bytes'] / 2**20:.2f} MiB" in out


def test_ask_changes_nothing_unless_told(place, capsys):
    ask = ["episodes", "ask", str(place / "memory"), "the dog in the park?", "--max-new", "8"]
    before = files(place / "memory")
    assert main(ask) == 0
    first = capsys.readouterr()
    assert first.out.strip()
    assert "episode" in first.err
    assert "the dog in the park" in first.err
    assert "similarity" in first.err
    assert files(place / "memory") == before
    assert main([*ask, "--keep"]) == 0
    kept = capsys.readouterr()
    assert kept.out == first.out
    memory, facts = peek(place / "memory")
    said = [(u.speaker, u.text) for u in memory.conversation.utterances[24:]]
    assert said == [("user", "the dog in the park?"), ("assistant", first.out.strip())]
    assert facts["settings"]["tokens"] > memory.read


def test_one_of_several(place, tmp_path, capsys):
    """LoCoMo's shape: chosen by number or by name."""
    turn = lambda k: {"speaker": "Ana", "dia_id": f"D1:{k}", "text": "tea and cake"}
    item = lambda name: {
        "sample_id": name,
        "conversation": {"session_1": [turn(1), turn(2)], "session_1_date_time": "1 May"},
        "qa": [],
    }
    (place / "many.json").write_text(json.dumps([item("conv-a"), item("conv-b")]))
    line = fails(main, capsys, *build(place, tmp_path / "m", file="many.json"))
    assert "no choice among 2; expected 1 to 2, or one of conv-a, conv-b" in line
    for which in ("3", "conv-c"):
        argv = build(place, tmp_path / "m", "--conversation", which, file="many.json")
        assert which in fails(main, capsys, *argv)
    for which in ("2", "conv-b"):
        argv = build(place, tmp_path / which, "--conversation", which, file="many.json")
        assert main(argv) == 0
        assert peek(tmp_path / which)[0].conversation.name == "conv-b"
    capsys.readouterr()


def test_mistakes_end_in_one_line(place, tmp_path, capsys):
    wrong = lambda *argv: fails(main, capsys, "episodes", *argv)
    empty = tmp_path / "empty"
    assert "kvjax episodes build" in wrong("show", empty)
    assert "kvjax episodes build" in wrong("ask", empty, "When?")
    assert "no text" in wrong("ask", place / "memory", " ")
    argv = build(place, place / "memory")
    assert "--replace" in fails(main, capsys, *argv)
    assert "No such file" in fails(main, capsys, *build(place, empty, file="none.txt"))
    (place / "odd.json").write_text('{"messages": [1, 2]}')
    line = fails(main, capsys, *build(place, empty, file="odd.json"))
    assert all(name in line for name in ("locomo", "realtalk", "longmemeval", "plain"))
    line = fails(main, capsys, *build(place, empty, "--format", "csv"))
    assert "locomo, realtalk, longmemeval, plain" in line
    assert "35 that always stay" in fails(main, capsys, *build(place, empty, "--budget", 30))
    (place / "long.txt").write_text(TALK * 6)
    assert "positions" in fails(main, capsys, *build(place, empty, file="long.txt"))
    assert not list(empty.glob("0*"))
    taken = tmp_path / "file"
    taken.write_text("")
    assert "no folder" in wrong("show", taken)
