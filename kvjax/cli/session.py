"""A conversation with a memory, for the commands that have one: settings, reader, one turn."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.cli import options
from kvjax.core.errors import InputError, known

if TYPE_CHECKING:
    from kvjax.cli.turns import Turns
    from kvjax.core.method import Method
    from kvjax.episodes.conversation import Conversation
    from kvjax.episodes.embed import Embedder
    from kvjax.episodes.memory import Memory, Reader
    from kvjax.models.load import Model

Settings = dict[str, Any]  # plain data, kept with a memory: all that its reader is made from
Report = Callable[[str], None]

EPISODES = 4
DEFAULTS: Settings = {
    "model": "smollm2-135m",
    "method": "turboquant-3",
    "calibration": None,
    "sink": 4,
    "recent": 64,
    "page": 64,
    "policy": "epicache",
    "budget": 1024,
    "block": 256,
    "compete": "head",
    "episodes": None,  # 4, or 1 for a policy that would make them all alike
    "room": 1024,
    "embedder": "minilm",
}
EMBEDDERS = ("minilm", "model")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What a memory is made with. No option has a default: a memory that is there tells them."""
    default = lambda name: f"({DEFAULTS[name]})"
    parser.add_argument("--model", help=f"{options.MODEL_HELP} {default('model')}")
    parser.add_argument("--method", help=default("method"))
    parser.add_argument(
        "--embedder", help=f"minilm, or model for its own embeddings {default('embedder')}"
    )
    parser.add_argument("--episodes", type=int, help=f"caches of a conversation ({EPISODES})")
    parser.add_argument(
        "--room",
        type=int,
        help=f"tokens of new turns before all is read again {default('room')}",
    )
    options.add_calibration(parser)
    options.add_policy(parser)
    group = parser.add_argument_group("layout of the cache")
    for name in ("sink", "recent", "page"):
        group.add_argument(f"--{name}", type=int, help=default(name))


def add_answer(parser: argparse.ArgumentParser) -> None:
    """How answers are written."""
    parser.add_argument("--max-new", type=int, default=256, help="tokens at most (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the best token (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for sampling (%(default)s)")


def check_answer(args: argparse.Namespace) -> None:
    options.positive("--max-new", args.max_new)
    if not 0 <= args.temperature < math.inf:
        raise InputError(
            "--temperature", got=args.temperature, expected="0 or more", fix="0 is greedy"
        )


def settings_of(args: argparse.Namespace, stored: Settings | None) -> Settings:
    """The settings of a memory: those that it was made with, or the options and defaults.

    Raises:
      InputError: an option that differs from what the memory was made with, or that serves nobody;
        a memory that does not say what it was made with.
    """
    given: Settings = {name: getattr(args, name, None) for name in DEFAULTS}
    for name in ("model", "calibration"):
        if given[name] is not None and (path := Path(given[name]).expanduser()).exists():
            given[name] = str(path.resolve())
    if stored is None:
        settings = {name: DEFAULTS[name] if v is None else v for name, v in given.items()}
        if settings["episodes"] is None:
            settings["episodes"] = EPISODES if settings["policy"] == "epicache" else 1
        _check(settings)
        return settings
    if missing := [name for name in DEFAULTS if name not in stored]:
        raise InputError(
            "memory",
            got=f"one that does not say its {', '.join(missing)}",
            expected="one of `kvjax chat` or `kvjax episodes build`",
            fix="open it from Python with `episodes.store.load`, or name another folder",
        )
    for name, value in given.items():
        if value is not None and value != stored[name]:
            raise InputError(
                f"--{name}",
                got=value,
                expected=f"{stored[name]}, with which the memory was made",
                fix="leave it out, or name another folder",
            )
    return dict(stored)


def _check(settings: Settings) -> None:
    """Mistakes that can be told before anything is loaded."""
    from kvjax.calibrate.names import check_name

    check_name(settings["method"], settings["calibration"])
    options.check_policy(settings["policy"])
    if settings["policy"] == "kvzip":
        raise InputError(
            "--policy",
            got="kvzip, which judges by a prompt that repeats the text",
            expected="episodes that judge by their own prompts",
            fix="use epicache, which is kvzip's scorer with such prompts",
        )
    for name in ("episodes", "room", "budget", "block"):
        options.positive(f"--{name}", settings[name])
    if settings["policy"] != "epicache" and settings["episodes"] > 1:
        raise InputError(
            "--episodes",
            got=f"{settings['episodes']} with {settings['policy']}",
            expected="1: judged without an episode's prompt, all caches would be alike",
            fix="leave it out, or use --policy epicache",
        )
    if settings["embedder"] not in EMBEDDERS:
        raise InputError(
            "--embedder", got=settings["embedder"], expected=known(EMBEDDERS), fix="name one"
        )


def open_reader(settings: Settings, report: Report) -> Reader:
    """Model, method and embedder, loaded."""
    from kvjax.core.layout import Layout
    from kvjax.episodes.memory import Reader
    from kvjax.episodes.memory import Settings as Remembering
    from kvjax.models.load import load

    layout = Layout(**{name: settings[name] for name in ("sink", "recent", "page")})
    if settings["embedder"] == "minilm":
        _check_minilm()
    options.use_compilation_cache()
    report(f"loading {settings['model']}")
    model = load(settings["model"])
    eviction = options.eviction_of(
        model.config,
        settings["policy"],
        settings["budget"],
        settings["block"],
        settings["compete"],
        tokens=model.config.max_positions,
        layout=layout,
    )
    method = _method(settings, model, layout)
    how = Remembering(eviction, episodes=settings["episodes"], room=settings["room"])
    reader = Reader.create(model, method, _embedder(settings["embedder"], model), how)
    windowless = [group for group in reader.plan.groups if group.window is None]
    eviction.check(sum(len(group.layers) for group in windowless), layout)
    return reader


def _method(settings: Settings, model: Model, layout) -> Method | tuple[Method, ...]:
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.names import get_for_model

    moments = None
    if settings["calibration"] is not None:
        moments, _ = load_moments(settings["calibration"], model.config, model.params)
    return get_for_model(
        settings["method"], model.config, moments, layout=layout, params=model.params
    )


def _check_minilm() -> None:
    from kvjax.models import hub

    if hub.installed(hub.find("minilm")) is None:
        raise InputError(
            "--embedder",
            got="minilm, which is not on this machine",
            expected=f"its file at {hub.path_of(hub.find('minilm'))}",
            fix="run `kvjax models fetch minilm`, or use --embedder model",
        )


def _embedder(name: str, model: Model) -> Embedder:
    from kvjax.episodes.embed import minilm, of_model

    if name == "minilm":
        return minilm()
    assert model.tokenizer is not None or name != "model"
    return of_model(model.params, model.tokenizer)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One turn that was answered, not yet remembered.

    Attributes:
      episode, similarity: where it went, and how well that fits (None: there is no choice yet).
      tokens: that the conversation has grown by. pending: those its cache was not fed.
    """

    question: str
    text: str
    episode: int
    similarity: float | None
    caches: Any
    pending: tuple[int, ...]
    tokens: int


@dataclasses.dataclass
class Session:
    """A conversation under way; `keep` adds a turn to it, and `rebuild` reads it anew.

    Attributes:
      tokens: of the whole conversation in the model's format.
    """

    reader: Reader
    turns: Turns
    memory: Memory
    tokens: int

    @classmethod
    def of(cls, reader: Reader, memory: Memory) -> Session:
        from kvjax.cli.turns import turns_of

        assert reader.model.tokenizer is not None
        turns = turns_of(reader.model.tokenizer)
        history = turns.history(memory.conversation)
        return cls(reader, turns, memory, len(reader.tokens(history, bos=True)))

    @classmethod
    def begin(cls, reader: Reader, conversation: Conversation, report: Report) -> Session:
        """Reads a conversation, which may be empty."""
        from kvjax.cli.turns import turns_of
        from kvjax.episodes.memory import build

        assert reader.model.tokenizer is not None
        history = turns_of(reader.model.tokenizer).history(conversation)
        return cls.of(reader, build(reader, conversation, history=history, progress=report))

    def rebuild(self, report: Report) -> None:
        """Reads all that was said anew: room for more, and fresh episodes."""
        self.memory = Session.begin(self.reader, self.memory.conversation, report).memory

    def answer(
        self,
        text: str,
        *,
        routed_by: str | None = None,
        max_new: int,
        temperature: float,
        rng: Any,
        show: Callable[[str], None],
        report: Report,
    ) -> Answer:
        """Routes a user's turn and answers it; reads all anew first if its cache has no room.

        Args:
          routed_by: what the episode is chosen by, if not the text itself.
        Raises:
          InputError: a turn that even a fresh cache has no room for.
        """
        from kvjax.episodes.memory import cache_of, room_left, similarity

        reader = self.reader
        new = reader.tokens(self.turns.question(text))
        end = reader.tokens(self.turns.end)
        need = len(new) + max_new + len(end)
        fits = similarity(reader, self.memory, routed_by or text)
        if room_left(self.memory, int(fits.argmax())) < need:
            most = reader.settings.room
            if need <= most:
                report("no room for this turn in its cache: reading all that was said again")
                self.rebuild(report)
                fits = similarity(reader, self.memory, routed_by or text)
                most = room_left(self.memory, int(fits.argmax()))
            if need > most:
                raise InputError(
                    "turn",
                    got=f"{len(new)} tokens and {max_new} new ones",
                    expected=f"at most {max(0, most - len(end))} together, the room of a cache "
                    f"within the {reader.plan.config.max_positions} positions of the model",
                    fix="shorten it, lower --max-new, or make a memory with more --room",
                )
        episode = int(fits.argmax())
        prompt = [*self.memory.pending[episode], *new]
        caches = cache_of(self.memory, [episode])
        fed, waiting, words, caches = self._generate(
            prompt, caches, max_new, temperature, rng, show
        )
        return Answer(
            question=text,
            text=words.strip(),
            episode=episode,
            similarity=None if self.memory.index is None else float(fits[episode]),
            caches=caches,
            pending=(*waiting, *end),
            tokens=len(new) + len(fed) + len(waiting) + len(end),
        )

    def _generate(self, prompt, caches, max_new, temperature, rng, show):
        """The answer: ids in the caches, ids that are not yet, its words, and the caches."""
        from kvjax.generate import check_finite, start, step

        plan, params, stop = self.reader.plan, self.reader.model.params, self.turns.stop
        tokenizer, words = self.reader.model.tokenizer, ""
        assert tokenizer is not None
        stream = tokenizer.stream()
        sampling = {"temperature": temperature}
        state = start(plan, params, [prompt], max_new=max_new, rng=rng, caches=caches, **sampling)
        fed: list[int] = []
        waiting: list[int] = []
        while (token := int(state.token[0])) not in plan.config.eos_ids:
            piece = stream.push(token)
            if stop is not None and stop in piece and (words + piece.split(stop)[0]).strip():
                piece = piece.split(stop)[0]
                waiting = self.reader.tokens(piece) if piece else []
                stream = tokenizer.stream()  # what is behind the stop is not said
                show(piece)
                words += piece
                break
            show(piece)
            words += piece
            if len(fed) + 1 == max_new:
                waiting = [token]
                break
            state = step(plan, params, state, **sampling)
            fed.append(token)
        check_finite(state.finite)
        rest = stream.finish()
        show(rest)
        return fed, waiting, words + rest, state.caches

    def keep(self, answer: Answer) -> None:
        """Remembers an answered turn."""
        from kvjax.cli.turns import ASSISTANT, USER
        from kvjax.episodes.conversation import Utterance
        from kvjax.episodes.memory import remember

        today = datetime.date.today()
        date = f"{today.day} {today:%B %Y}"
        said = [Utterance(USER, answer.question, date=date)]
        said.append(Utterance(ASSISTANT, answer.text, date=date))
        self.memory = remember(
            self.reader,
            self.memory,
            answer.episode,
            answer.caches,
            said,
            pending=answer.pending,
        )
        self.tokens += answer.tokens

    def save(self, folder: str, settings: Settings) -> None:
        """Writes the memory and what it takes to open it again."""
        from kvjax.episodes.store import save

        save(self.reader, self.memory, folder, settings={**settings, "tokens": self.tokens})
