"""`kvjax episodes build | ask | show`: a long conversation in a file as a memory, and questions."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from typing import TYPE_CHECKING

from kvjax.cli import options, session
from kvjax.core.errors import InputError, known

if TYPE_CHECKING:
    from kvjax.episodes.conversation import Conversation
    from kvjax.episodes.memory import Memory


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "episodes",
        help="read a long conversation into a memory of fixed size, and ask about it",
        description="A conversation is clustered into episodes; each has a compressed cache that "
        "has read all of it and keeps what matters to the episode. A question goes to the episode "
        "that it fits.",
    )
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{build,ask,show}")
    build = actions.add_parser("build", help="read a file into a memory")
    build.add_argument(
        "file", help="LoCoMo, REALTALK or LongMemEval JSON, or text of `speaker: words` lines"
    )
    build.add_argument("--memory", required=True, metavar="DIR", help="folder of the memory")
    build.add_argument("--format", help="locomo, realtalk, longmemeval or plain (told by itself)")
    build.add_argument(
        "--conversation", help="its number, from 1, or name where a file has several"
    )
    build.add_argument("--replace", action="store_true", help="forget a memory that is there")
    session.add_settings(build)
    ask = actions.add_parser("ask", help="ask a memory; it stays as it is")
    ask.add_argument("memory", metavar="DIR", help="folder of the memory")
    ask.add_argument("question", help="what you want to know")
    ask.add_argument("--keep", action="store_true", help="remember question and answer")
    session.add_answer(ask)
    show = actions.add_parser("show", help="episodes, what they are about, bytes; loads no model")
    show.add_argument("memory", metavar="DIR", help="folder of the memory")


def run(args: argparse.Namespace) -> int:
    return {"build": _build, "ask": _ask, "show": _show}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from kvjax.episodes.formats import read
    from kvjax.episodes.store import alone, peek

    settings = session.settings_of(args, None)
    conversation = choose(read(args.file, args.format), args.conversation)
    if not args.replace and peek(args.memory) is not None:
        raise InputError(
            "--memory",
            got=f"{args.memory}, which has a memory",
            expected="a folder without one",
            fix="name another folder, or give --replace",
        )
    with alone(args.memory):
        with options.progress() as report:
            reader = session.open_reader(settings, report)
            begun = time.perf_counter()
            talk = session.Session.begin(reader, conversation, report)
            seconds = time.perf_counter() - begun
            talk.save(args.memory, settings)
        per_token = int(reader.plan.config.kv_bytes_per_token(2))
        print(table(talk.memory, talk.memory.bytes(), per_token * talk.tokens))
        print(f"[{talk.memory.read} tokens read in {seconds:.1f} s]", file=sys.stderr)
    return 0


def choose(found: tuple[Conversation, ...], which: str | None) -> Conversation:
    """One conversation of a file, by name or by number from 1.

    Raises:
      InputError: several and no choice, or one that is not there.
    """
    names = [conversation.name for conversation in found]
    if which is None:
        if len(found) == 1:
            return found[0]
        raise InputError(
            "--conversation",
            got=f"no choice among {len(found)}",
            expected=f"1 to {len(found)}, or {known(names[:12])}",
            fix="name one",
        )
    if which in names:
        return found[names.index(which)]
    if which.isdigit() and 1 <= int(which) <= len(found):
        return found[int(which) - 1]
    raise InputError(
        "--conversation",
        got=which,
        expected=f"1 to {len(found)}, or {known(names[:12])}",
        fix="name one",
    )


def _ask(args: argparse.Namespace) -> int:
    import jax

    from kvjax.cli.chat import note, status
    from kvjax.core.rng import fold
    from kvjax.episodes.conversation import Question
    from kvjax.episodes.prompt import question_prompt
    from kvjax.episodes.store import alone, load, peek

    session.check_answer(args)
    if not args.question.strip():
        raise InputError("question", got="no text", expected="a question", fix="ask something")
    found = peek(args.memory)
    if found is None:
        raise _nothing(args.memory)
    settings = session.settings_of(args, found[1]["settings"])
    with alone(args.memory) if args.keep else contextlib.nullcontext():
        with options.progress() as report:
            reader = session.open_reader(settings, report)
            memory = load(reader, args.memory)
        if memory is None:
            raise _nothing(args.memory)
        talk = session.Session.of(reader, memory)
        answer = talk.answer(
            question_prompt(Question(args.question)).strip(),
            routed_by=args.question,
            max_new=args.max_new,
            temperature=args.temperature,
            rng=fold(jax.random.key(args.seed), "turn"),
            show=lambda piece: print(piece, end="", flush=True),
            report=note,
        )
        print(flush=True)
        note(status(talk, answer))
        if args.keep:
            talk.keep(dataclasses.replace(answer, question=args.question))
            talk.save(args.memory, settings)
    return 0


def _show(args: argparse.Namespace) -> int:
    from kvjax.episodes.store import peek

    found = peek(args.memory)
    if found is None:
        raise _nothing(args.memory)
    memory, facts = found
    settings = facts["settings"]
    tokens = settings.get("tokens", memory.read)
    print(
        f"{facts['model']}, {facts['method']}; {settings.get('policy', 'a policy')} with "
        f"{max(facts['budget'])} tokens per head"
    )
    print(table(memory, facts["bytes"], facts["bytes_per_token"] * tokens))
    return 0


def table(memory: Memory, held: int, full: int) -> str:
    """Episodes with their sizes, dates and first words; bytes against the full cache."""
    from kvjax.cli.chat import first_words

    said = memory.conversation.utterances
    dates = list(dict.fromkeys(u.date for u in said if u.date))
    when = "" if not dates else f", {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    rows = [f"{memory.conversation.name}: {len(said)} turns{when}"]
    if memory.index is None:
        rows.append("one cache for all; episodes come when it is full, or with /rebuild")
    else:
        labels = memory.index.labels.tolist()
        for e in range(memory.episodes):
            own = [i for i, label in enumerate(labels) if label == e]
            rows.append(
                f"{e + 1:3d}  {len(own):4d} segments  {_dates(memory, own)}"
                f"{first_words(memory.about(e), 60)}"
            )
    share = f"{held / full:.2f} times the" if full else "for"
    rows.append(
        f"caches {held / 2**20:.2f} MiB, {share} {full / 2**20:.2f} MiB of all tokens in bf16"
    )
    return "\n".join(rows)


def _dates(memory: Memory, segments: list[int]) -> str:
    said = memory.conversation.utterances
    dates = list(dict.fromkeys(said[memory.firsts[i]].date for i in segments))
    if not any(dates):
        return ""
    return f"{dates[0]}  " if len(dates) == 1 else f"{dates[0]} to {dates[-1]}  "


def _nothing(folder: str) -> InputError:
    return InputError(
        f"memory in {folder}",
        got="nothing",
        expected="a memory",
        fix="make one with `kvjax episodes build` or `kvjax chat`",
    )
