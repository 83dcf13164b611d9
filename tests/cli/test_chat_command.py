"""`kvjax chat`: turns from a pipe, a memory that outlives the program, and one line for mistakes."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from memory_model import OWN, SMALL, fails, tiny_model

from kvjax.cli import chat, session
from kvjax.cli.main import main
from kvjax.cli.turns import PLAIN, turns_of
from kvjax.core.errors import InputError
from kvjax.episodes import Conversation, Utterance, store
from kvjax.episodes.store import alone, peek

ROOM = 320


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)


@pytest.fixture
def talk(model, monkeypatch, capsys):
    """Runs a chat over lines; returns what came on stdout and stderr."""

    def run(folder, *lines, more=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        argv = ["chat", "--memory", str(folder), "--max-new", "8", *map(str, more)]
        assert main(argv) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    run.new = ["--model", model, *OWN, *SMALL, "--room", ROOM, "--episodes", 2]
    return run


def said(folder) -> list[str]:
    return [u.text for u in peek(folder)[0].conversation.utterances]


def test_a_conversation_goes_on_after_a_restart(talk, tmp_path):
    folder = tmp_path / "memory"
    out, err = talk(folder, "Hello there", "", "What is tea?", "/show", "/what", more=talk.new)
    assert len(out.splitlines()) >= 2
    assert err.count("memory ") >= 2
    assert "in bf16" in err
    assert "no command /what: there are /show, /rebuild, /quit" in err
    assert "4 turns" in err
    first = said(folder)
    assert first[::2] == ["Hello there", "What is tea?"]
    assert first[1].strip() == out.splitlines()[0].strip()
    _, err = talk(folder, "And cake?", "/quit", "never read")  # DIR alone tells the settings
    assert "has 4 turns" in err
    assert said(folder)[:4] == first
    assert said(folder)[4] == "And cake?"
    assert len(said(folder)) == 6
    memory, facts = peek(folder)
    assert facts["settings"]["budget"] == 96
    # Tokens as the model read them: letters, but for the edges of three answers.
    letters = len(PLAIN.history(memory.conversation))
    assert facts["settings"]["tokens"] == pytest.approx(letters, abs=9)


def test_memory_is_the_same_with_and_without_a_restart(talk, tmp_path):
    lines = "Tea?", "Cake, or not?"
    talk(tmp_path / "a", *lines, more=talk.new)
    talk(tmp_path / "b", lines[0], more=talk.new)
    talk(tmp_path / "b", lines[1])
    assert said(tmp_path / "a") == said(tmp_path / "b")


def test_when_room_ends_all_is_read_again(talk, tmp_path):
    lines = [f"{word} and again {word}, is it not so, my friend?" for word in ("tea", "dog") * 3]
    _, err = talk(tmp_path, *lines, "/show", more=talk.new)
    assert "no room for this turn in its cache: reading all that was said again" in err
    memory, _ = peek(tmp_path)
    assert memory.read > 96
    assert memory.episodes == 2
    assert len(memory.conversation.utterances) == 12
    assert "episode 1 of 2, similarity" in err or "episode 2 of 2, similarity" in err
    _, err = talk(tmp_path, "/rebuild")
    assert "2 episodes of" in err
    assert peek(tmp_path)[0].read > memory.read


def test_saving_now_and_then(talk, tmp_path, monkeypatch):
    """A kill loses the turns since the last save; an end of the input does not."""
    saves = []
    real = session.Session.save
    monkeypatch.setattr(
        session.Session, "save", lambda self, *a: (saves.append(self.tokens), real(self, *a))
    )
    talk(tmp_path, "One", "Two", "Three", more=[*talk.new, "--save-every", 2])
    assert len(saves) == 2
    assert len(said(tmp_path)) == 6


def test_interrupts(talk, tmp_path, monkeypatch):
    """At the prompt: saved and a clean end. During an answer: that turn alone is forgotten."""

    def typed():
        yield "Hello"
        raise KeyboardInterrupt

    talk(tmp_path, "First", more=talk.new)
    monkeypatch.setattr(chat, "lines", typed)
    talk(tmp_path, more=["--save-every", 9])
    assert said(tmp_path)[2] == "Hello"
    assert len(said(tmp_path)) == 4
    monkeypatch.setattr(chat, "lines", lambda: iter(["Lost", "Kept"]))
    real = session.Session._generate

    def stopped(self, *args):
        real(self, *args)
        monkeypatch.setattr(session.Session, "_generate", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.Session, "_generate", stopped)
    _, err = talk(tmp_path)
    assert "stopped; this turn is not remembered" in err
    assert said(tmp_path)[4] == "Kept"
    assert len(said(tmp_path)) == 6


def test_mistakes_end_in_one_line(talk, model, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "memory"
    bad = lambda *more: fails(main, capsys, "chat", "--memory", folder, *more)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert "models fetch minilm" in bad("--model", model)
    assert "--embedder model" in bad("--model", model)
    assert "epicache, which is kvzip's scorer" in bad("--policy", "kvzip")
    assert "all caches would be alike" in bad("--policy", "h2o", "--episodes", 2)
    assert "streaming" in bad("--policy", "lru")
    assert "minilm, model" in bad("--embedder", "bert")
    assert "--room" in bad("--room", 0)
    assert "--save-every" in bad("--save-every", 0)
    for temperature in (-1, "nan", "inf"):
        assert "--temperature" in bad("--temperature", temperature)
    assert "turboquant-3" in bad("--method", "turbo")
    assert "always stay" in bad("--model", model, *OWN, *SMALL, "--budget", 20)
    assert not list(folder.glob("0*"))
    talk(folder, "Hello", more=talk.new)
    for option, value in [("--budget", 128), ("--method", "int4"), ("--policy", "h2o")]:
        line = bad(option, value)
        assert "with which the memory was made" in line
        assert option in line
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 400 + "\n"))
    assert "lower --max-new" in bad("--max-new", 8)
    assert len(said(folder)) == 2
    with alone(folder):
        assert "another conversation" in bad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_read_facts", without_settings(store._read_facts))
        assert "one of `kvjax chat` or `kvjax episodes build`" in bad()
        ask = fails(main, capsys, "episodes", "ask", folder, "When?")
        assert "does not say its model, method" in ask
    at = folder / (folder / "current").read_text().split()[0]
    (at / "arrays.safetensors").write_bytes(b"")
    assert "arrays.safetensors" in bad()


def without_settings(read):
    """As of a memory that was saved from Python."""

    def facts(root):
        at, found = read(root)
        return at, {**found, "settings": {}}

    return facts


def test_history_is_what_was_answered():
    """What a memory is built anew from is what the turns were made of."""
    people = (Utterance("Ana", "Tea?", date="1 May"), Utterance("Ben", "Yes.", date="1 May"))
    chat = (Utterance("user", "Who?"), Utterance("assistant", "Ben"))
    turns = PLAIN.history(Conversation("a", (*people, *chat), starts=(0, 2)))
    assert turns == (
        "Below is a conversation between Ana and Ben, with the date of each session.\n\n"
        'DATE: 1 May\nCONVERSATION:\nAna said, "Tea?"\nBen said, "Yes."\n\n'
        "User: Who?\nAssistant: Ben\n"
    )
    alone = PLAIN.history(Conversation("b", chat))
    assert alone == PLAIN.opening + PLAIN.question("Who?") + " Ben" + PLAIN.end


class Words:
    """As much of a tokenizer as formats need: text is its own ids."""

    def __init__(self, template):
        self.chat_template = template

    def encode(self, text):
        return list(text)

    def decode(self, ids, special=False):
        return "".join(ids)

    def chat(self, messages):
        assert messages == []
        return list("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n")


def test_chat_formats():
    chatml = turns_of(Words("... <|im_start|> ..."))
    assert chatml.opening == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert chatml.question("Hi") == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    talk = Conversation("c", (Utterance("user", "Hi"), Utterance("assistant", "Ho")))
    assert chatml.history(talk) == chatml.opening + chatml.question("Hi") + "Ho<|im_end|>\n"
    gemma = turns_of(Words("<start_of_turn>"))
    assert gemma.history(talk) == (
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
    )
    assert turns_of(Words(None)) is PLAIN


def test_what_is_half_said_is_said(monkeypatch):
    """A last character whose bytes never became whole is shown, as far as it came; what stands
    behind the stop is not."""
    pieces = {1: "Ha", 2: "", 3: " ho\nUser"}

    class Stream:
        held = ""

        def push(self, token):
            self.held = "" if pieces[token] else "?"
            return pieces[token]

        def finish(self):
            return self.held

    tokens = iter(())
    state = lambda *a, **k: SimpleNamespace(token=[next(tokens)], finite=None, caches=None)
    for name, fake in [("start", state), ("step", state), ("check_finite", lambda finite: None)]:
        monkeypatch.setattr(f"kvjax.generate.{name}", fake)
    plan = SimpleNamespace(config=SimpleNamespace(eos_ids=(0,)))
    model = SimpleNamespace(params=None, tokenizer=SimpleNamespace(stream=Stream))
    reader = SimpleNamespace(plan=plan, model=model, tokens=list)
    talk = session.Session(reader, PLAIN, None, 0)
    for given, words, waiting in [((1, 2, 0), "Ha?", []), ((2, 3), " ho", [*" ho"])]:
        tokens, shown = iter(given), []
        _, left, said, _ = talk._generate([], None, 9, 0.0, None, shown.append)
        assert said == "".join(shown) == words
        assert left == waiting


def test_settings_are_checked_before_loading():
    with pytest.raises(InputError, match="no --calibration"):
        session._check({**session.DEFAULTS, "method": "klt-2", "episodes": 1})
