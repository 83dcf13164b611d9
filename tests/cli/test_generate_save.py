"""`kvjax generate --save`: ended and run again it says what it goes on from, and ends the same."""

from __future__ import annotations

import pytest
from memory_model import fails, tiny_model

from kvjax.checkpoint import Saver
from kvjax.cli.main import main

PROMPT = "the quick brown fox jumps over the lazy dog " * 4  # a token per letter: 176
SHAPE = ["--sink", "2", "--recent", "16", "--page", "16", "--max-new", "12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("save") / "tiny"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)


class Killed(BaseException):
    pass


def run(model, folder, *more, dies_at=None, prompt=PROMPT):
    """The command; `dies_at` kills it at its save of that number."""
    saved = 0
    real = Saver.save

    def save(self, *args, **kwargs):
        nonlocal saved
        saved += 1
        if saved == dies_at:
            raise Killed
        return real(self, *args, **kwargs)

    given = [] if folder is None else ["--save", str(folder), "--save-every", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save)
        return main(["generate", prompt, "--model", model, *SHAPE, *given, *more])


@pytest.mark.parametrize("more", [["--temperature", "0.7", "--seed", "3"], ["--policy"]])
def test_it_goes_on_where_it_was_killed(more, model, tmp_path, capsys):
    if more == ["--policy"]:
        more = ["--policy", "snapkv", "--budget", "64", "--block", "32"]
    assert run(model, None, *more) == 0
    want = capsys.readouterr().out
    assert len(want) > 10
    with pytest.raises(Killed):
        run(model, tmp_path, *more, dies_at=3)
    printed = capsys.readouterr()
    assert "resumed" not in printed.err
    assert run(model, tmp_path, *more) == 0
    printed = capsys.readouterr()
    assert printed.out == want
    (line,) = [x for x in printed.err.splitlines() if "resumed" in x]
    if "--policy" in more:
        assert line == f"[resumed: 176 of 176 tokens read, 5 of 12 made, from {tmp_path}/000002]"
    else:
        assert line == f"[resumed: 176 of 176 tokens read, 1 of 12 made, from {tmp_path}/000002]"
    assert run(model, tmp_path, *more) == 0  # it has ended: the same again
    printed = capsys.readouterr()
    assert printed.out == want
    assert "10 of 12 made" in printed.err


def test_another_run_in_the_folder_is_told(model, tmp_path, capsys):
    assert run(model, tmp_path) == 0
    capsys.readouterr()
    base = ["generate", PROMPT, "--model", model, *SHAPE, "--save", tmp_path]
    for word, argv in (
        ("prompt", [*base[:1], "Another", *base[2:]]),
        ("method", [*base, "--method", "int4"]),
        ("layout", [*base, "--recent", "32"]),
        ("max_new", [*base, "--max-new", "13"]),
        ("temperature", [*base, "--temperature", "0.5"]),
        ("codec", [*base, "--seed", "4"]),  # rotations are drawn from it too
        ("keep", [*base, "--policy", "snapkv", "--budget", "64"]),
    ):
        line = fails(main, capsys, *argv)
        assert f"checkpoint in {tmp_path}: got {word}" in line
        assert "name another folder" in line
    assert "got no --save" in fails(main, capsys, *base[:-2], "--save-every", "5")
    assert "got 0" in fails(main, capsys, *base, "--save-every", "0")
    assert "--save: got no name" in fails(main, capsys, *base[:-1], "")
    (tmp_path / "file").write_text("")
    assert "can be written" in fails(main, capsys, *base[:-1], tmp_path / "file")
