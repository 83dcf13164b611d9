"""What experiments/conversations.py measures: cases by name, and a conversation that is made up."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from kvjax.core.errors import InputError, known
from kvjax.episodes.conversation import Conversation, Question, Utterance
from kvjax.policies import Eviction, get
from kvjax.policies.names import POLICIES
from kvjax.policies.probe import Probe

Row = dict[str, Any]

ALL, EPISODES, KNOWN = "all", "episodes", "known"
KINDS = (ALL, EPISODES, KNOWN, *POLICIES)

# Of a line: what decides its numbers. A rerun skips the lines that are there.
SETTINGS = (
    *("kvjax", "model", "weights", "dtype", "case", "method", "calibration", "conversation"),
    *("data", "limit", "budget", "block", "layout", "episodes", "embedder", "seed"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """How a history is kept, as `name/option/option=value`.

    Attributes:
      name: as it was written.
      kind: "all" keeps every token; "episodes" is a cache per episode, judged by its medoids;
        "known" one per question, judged by the question itself; others are policies.
      share: of the budget; 0.25 for four episodes makes their bytes together those of one cache.
      compete: among whom tokens compete.
      reduce: of probes, over their queries.
      medoids, smooth: of episodes.
      once: evict when all has been read, not block by block; the peak is then the whole history.
    """

    name: str
    kind: str
    share: float = 1.0
    compete: str = "head"
    reduce: str = "max"
    medoids: int = 8
    smooth: float = 0.3
    once: bool = False

    @property
    def evicts(self) -> bool:
        return self.kind != ALL

    @property
    def probes(self) -> bool:
        """Whether a prompt judges."""
        return self.kind in (EPISODES, KNOWN) or POLICIES.get(self.kind) is Probe


def parse_case(name: str) -> Case:
    """A case from its name.

    Raises:
      InputError: an unknown kind or option, or a value that is none.

    Example:
      >>> parse_case("episodes/share=0.25/once").share
      0.25
    """
    kind, *options = name.split("/")
    if kind not in KINDS:
        raise InputError("case", got=repr(name), expected=known(KINDS), fix="begin with one")
    types = {"share": float, "compete": str, "reduce": str, "medoids": int, "smooth": float}
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        try:
            given[key] = True if key == "once" and not equals else types[key](value)
        except (KeyError, ValueError) as error:
            raise InputError(
                f"case {name}",
                got=repr(option),
                expected=known([*(f"{t}=VALUE" for t in types), "once"]),
                fix="write it so",
            ) from error
    return Case(name, kind, **({"once": True} if kind == KNOWN else {}) | given)


def eviction_of(case: Case, budget: int, block: int) -> Eviction:
    """Policy and budget of one cache. H2O keeps half of its budget for recent tokens."""
    tokens = max(1, round(case.share * budget))
    policy = Probe(reduce=case.reduce) if case.probes else get(case.kind)
    recent = tokens // 2 if case.kind == "h2o" else 0
    return Eviction(policy, budget=tokens, block=block, compete=case.compete, recent=recent)


def settings_of(row: Row) -> str:
    """What decides the numbers of a line, as one string."""
    return json.dumps({name: row.get(name) for name in SETTINGS}, sort_keys=True)


def made_up(name: str, *, turns: int = 48, seed: int = 0) -> Conversation:
    """A conversation of two topics in turn, with a question on every eighth utterance."""
    rng = np.random.default_rng(seed)
    topics = (("tea", "cake", "milk", "cup", "bread"), ("rain", "sun", "wind", "snow", "fog"))
    said, questions = [], []
    for i in range(turns):
        words = rng.choice(topics[i // 8 % 2], 4).tolist()
        speaker = ("Ana", "Ben")[i % 2]
        said.append(Utterance(speaker, " ".join(words), f"D1:{i + 1}", "1 May"))
        if i % 8 == 4:
            ask = f"What did {speaker} say after {words[0]}?"
            questions.append(Question(ask, " ".join(words[1:]), (f"D1:{i + 1}",), "4"))
    return Conversation(name, tuple(said), tuple(questions))
