"""`kvjax chat`: a conversation over a memory of fixed size, kept on disk.

It can get as long as the model has positions: beyond them nothing can be read again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvjax.cli import options, session
from kvjax.core.errors import InputError

if TYPE_CHECKING:
    from kvjax.cli.session import Answer, Session

COMMANDS = {
    "/show": "what is remembered, by episode",
    "/rebuild": "read all that was said again: fresh episodes, and room",
    "/quit": "save and end",
}


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model that keeps a long conversation in a budget, on disk",
        description="Reads a line, answers it, and remembers both. All that was said is kept in "
        "words; the caches hold a budget of it for each episode, and a turn goes through the cache "
        "of the episode that it fits. It can get as long as the model has positions. An empty "
        "folder begins a conversation; a memory of chat or of `kvjax episodes build` goes on, with "
        "the settings that it was made with. "
        "Commands: " + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + ".",
    )
    parser.add_argument("--memory", required=True, metavar="DIR", help="folder of the memory")
    parser.add_argument(
        "--save-every",
        type=int,
        default=1,
        metavar="N",
        help="turns between two saves; a kill loses those since the last one (%(default)s)",
    )
    session.add_settings(parser)
    session.add_answer(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from kvjax.episodes.conversation import Conversation
    from kvjax.episodes.store import alone, load, peek

    session.check_answer(args)
    options.positive("--save-every", args.save_every)
    found = peek(args.memory)
    settings = session.settings_of(args, None if found is None else found[1]["settings"])
    with alone(args.memory):
        with options.progress() as report:
            reader = session.open_reader(settings, report)
            memory = load(reader, args.memory)
            if memory is None:
                nothing = Conversation("chat", ())
                talk = session.Session.begin(reader, nothing, lambda text: None)
            else:
                talk = session.Session.of(reader, memory)
        said = len(talk.memory.conversation.utterances)
        note(f"{reader.model.config.name}, {settings['method']}; {args.memory} has {said} turns")
        return _talk(args, talk, lambda: talk.save(args.memory, settings))


def _talk(args: argparse.Namespace, talk: Session, save) -> int:
    import jax

    from kvjax.core.rng import fold

    unsaved = 0
    try:
        for line in lines():
            words = line.strip()
            if not words:
                continue
            if words == "/quit":
                break
            said = len(talk.memory.conversation.utterances)
            rng = fold(jax.random.key(args.seed), "turn", said)
            try:
                if words.startswith("/"):
                    unsaved += _command(words, talk)
                    continue
                answer = talk.answer(
                    words,
                    max_new=args.max_new,
                    temperature=args.temperature,
                    rng=rng,
                    show=lambda piece: print(piece, end="", flush=True),
                    report=note,
                )
            except KeyboardInterrupt:
                print(flush=True)
                note("stopped; this turn is not remembered")
                continue
            except InputError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"kvjax: {error}", file=sys.stderr)
                continue
            print(flush=True)
            talk.keep(answer)
            note(status(talk, answer))
            unsaved += 1
            if unsaved >= args.save_every:
                save()
                unsaved = 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        if unsaved:
            save()
    return 0


def lines() -> Iterator[str]:
    """Lines from the terminal, with its editing, or from a pipe."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise InputError(
                "input", got=f"bytes that are no text ({error})", expected="UTF-8", fix="convert it"
            ) from error
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (arrow keys in input())
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def _command(words: str, talk: Session) -> int:
    """Runs a command; returns how much there is to save."""
    from kvjax.cli.episodes import table

    if words == "/show":
        per_token = int(talk.reader.plan.config.kv_bytes_per_token(2))
        print(table(talk.memory, talk.memory.bytes(), per_token * talk.tokens), file=sys.stderr)
        return 0
    if words == "/rebuild":
        talk.rebuild(note)
        note(f"{talk.memory.episodes} episodes of {talk.memory.read} tokens")
        return 1
    note(f"no command {words.split()[0]}: there are {', '.join(COMMANDS)}")
    return 0


def status(talk: Session, answer: Answer) -> str:
    """One line: the episode that answered, what it is about, and bytes against the full cache."""
    memory, held = talk.memory, talk.memory.bytes()
    full = int(talk.reader.plan.config.kv_bytes_per_token(2)) * talk.tokens
    where = "the only cache"
    if answer.similarity is not None:
        where = f"episode {answer.episode + 1} of {memory.episodes}"
        where += (
            f", similarity {answer.similarity:.2f}: {first_words(memory.about(answer.episode))}"
        )
    return (
        f"[{where}; memory {held / 2**20:.2f} MiB; all {talk.tokens} tokens in bf16: "
        f"{full / 2**20:.2f} MiB]"
    )


def first_words(text: str, most: int = 48) -> str:
    """The beginning of a text on one line, in so many characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3].rstrip() + "..."


def note(text: str) -> None:
    """A line on stderr, dim on a terminal."""
    dim = f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text
    print(dim, file=sys.stderr, flush=True)
