"""One conversation under every case: its history is read, packed, and asked."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from conversations_cases import EPISODES, KNOWN, Case, Row, eviction_of

from kvjax.cache import Cache
from kvjax.episodes import Conversation, EpisodeIndex, cut, patched_prompt
from kvjax.episodes.embed import embed
from kvjax.episodes.memory import make_index
from kvjax.evals.conversation_caches import (
    evidence_inside,
    exact_caches,
    exact_plan,
    full_bytes,
    judge,
    read_whole,
    routes,
    state_bytes,
    tree_bytes,
)
from kvjax.evals.conversations import Answered, Talk, answer, compare, prefix, talk
from kvjax.evals.evicted import repeat_probe
from kvjax.generate.evict import ProbePrompt, full_layers, pack_all, start_working, take_history
from kvjax.generate.plan import Plan, check_finite
from kvjax.policies import Eviction
from kvjax.policies.probe import repeat_prompt

if TYPE_CHECKING:
    from conversations_bench import Bench

_ROUND = 64  # tokens: lengths of probes are rounded up to so many, so that they share a program


@dataclasses.dataclass(frozen=True)
class Read:
    """A history as a case left it, before it is encoded.

    Attributes:
      sets: working sets, and caches of layers with a sliding window; a sequence per episode, or
        per question with "known".
      peak: bytes of the exact tokens while the history was read.
      seconds: that it took, compiling included.
    """

    sets: tuple[Any, ...]
    eviction: Eviction
    peak: int
    seconds: float


class Session:
    """One conversation: its questions, its index, and what the full exact cache says."""

    def __init__(self, bench: Bench, conversation: Conversation):
        self.bench, self.config = bench, bench.config
        self.params = bench.model.params
        beginning = prefix(conversation, bench.tokenizer, self.config.limit)
        if self.config.questions:
            few = beginning.questions[: self.config.questions]
            beginning = dataclasses.replace(beginning, questions=few)
        self.talk: Talk = talk(beginning, bench.tokenizer)
        _, _, page = self.config.layout
        self.room = -(-self.talk.room // page) * page
        self.questions = range(len(self.talk.questions))
        self.index = functools.lru_cache(self.make_index)
        self.whole: dict[tuple[int, int], tuple[Any, ...]] = {}  # by slots and plan
        print(
            f"{conversation.name}: {len(beginning.utterances)} utterances, "
            f"{len(self.talk.history)} tokens, {len(self.questions)} questions",
            flush=True,
        )
        self.reference = self.exact()

    def exact(self) -> np.ndarray:
        """Hidden states at the answers, from a float32 cache that packs nothing."""
        config, history = self.bench.model.config, self.talk.history
        plan = exact_plan(config, len(history) + self.room, page=self.config.layout[2])
        caches = exact_caches(plan, self.params, history, room=self.room, dtype=jnp.float32)
        return self.ask(plan, caches, [(i, 0) for i in self.questions]).hidden

    def ask(self, plan: Plan, caches: tuple[Cache, ...], rows) -> Answered:
        return answer(plan, self.params, caches, self.talk, rows, batch=self.config.batch)

    def rows(self, case: Case, methods: Sequence[str]) -> Iterator[Row]:
        """Lines of a case: its history is read once, and encoded with each method."""
        left = self.read(case) if case.evicts else None
        for method in methods:
            plan = self.bench.plan(method)
            if left is None:
                start = time.perf_counter()
                caches = exact_caches(plan, self.params, self.talk.history, room=self.room)
                total = tree_bytes(caches)
                sizes = {"active_bytes": total, "total_bytes": total, "peak_bytes": total}
                seconds = time.perf_counter() - start
            else:
                if len(plan.groups) > 1 or plan.groups[0].window is not None:
                    left = self.read(case, plan)  # its layers are read in codes of their own
                caches = pack_all(plan, left.eviction, left.sets, room=self.room)
                active, total = state_bytes(caches)
                total = active if case.kind == KNOWN else total
                sizes = {"active_bytes": active, "total_bytes": total, "peak_bytes": left.peak}
                seconds = left.seconds
            numbers = self.scores(case, plan, caches, every=method == "bf16")
            tokens = len(self.talk.history)
            sizes["full_bytes"] = full_bytes(self.bench.plan("bf16"), tokens + self.room)
            yield {
                **self.bench.settings(self.talk.conversation.name, case, method),
                **sizes,
                **numbers,
                "tokens": tokens,
                "utterances": len(self.talk.conversation.utterances),
                "questions": len(self.questions),
                "seconds_to_read": round(seconds, 2),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **self.bench.made,
            }

    def scores(self, case: Case, plan: Plan, caches, *, every: bool) -> Row:
        """KL and the like of every question, by the route that it takes."""
        n = len(self.questions)
        if case.kind != EPISODES:
            rows = [(i, i if case.kind == KNOWN else 0) for i in self.questions]
            asked = self.ask(plan, caches, rows)
            found = {"only": self.compared(asked.hidden)}
            return {"routes": found, "seconds_per_question": asked.seconds}
        index, queries = self.index(case.medoids, case.smooth), self.queries()
        ways = routes(index, queries, self.talk.evidence)
        if not every:
            rows = [(i, int(ways[self.config.route][i])) for i in self.questions]
            asked = self.ask(plan, caches, rows)
            found = {self.config.route: self.compared(asked.hidden)}
            return {"routes": found, "seconds_per_question": asked.seconds}
        pairs = [(i, e) for e in range(index.episodes) for i in self.questions]
        asked = self.ask(plan, caches, pairs)
        ways["likelihood"] = asked.question_nll.reshape(index.episodes, n).argmin(0)
        parts = np.split(asked.hidden, index.episodes)
        each = [self.compared(hidden) for hidden in parts]
        at = lambda e: {name: [each[e[i]][name][i] for i in self.questions] for name in each[0]}
        kl = np.array([one["kl"] for one in each])  # [E, q]
        found = {how: at(e) for how, e in ways.items()} | {"hindsight": at(kl.argmin(0))}
        chance = {name: np.mean([one[name] for one in each], 0).tolist() for name in each[0]}
        inside = {how: evidence_inside(index, e, self.talk.evidence) for how, e in ways.items()}
        return {
            "routes": found | {"chance": chance},
            "seconds_per_question": asked.seconds,
            "evidence_inside": inside,
            "sizes": np.asarray(index.sizes).tolist(),
        }

    def compared(self, hidden: np.ndarray) -> Row:
        plan = self.bench.plan("bf16")
        scores = compare(plan, self.params, self.reference, hidden, self.talk)
        return {f.name: getattr(scores, f.name).tolist() for f in dataclasses.fields(scores)}

    def read(self, case: Case, plan: Plan | None = None) -> Read:
        """The history under a case's policy."""
        start = time.perf_counter()
        plan = self.bench.plan("bf16") if plan is None else plan
        block = self.config.limit if case.once else self.config.block
        eviction = eviction_of(case, self.config.budget, block)
        eviction.check(len(full_layers(plan)), plan.methods[0].layout)
        prompts = self.prompts(case)
        if case.once and case.probes:
            sets, peak = self.judged(plan, eviction, prompts)
            return Read(sets, eviction, peak, time.perf_counter() - start)
        probe = None
        if case.kind == EPISODES:
            probe = ProbePrompt(prompts, _rounded(max(map(len, prompts))))
        elif case.probes:
            probe = repeat_probe(self.bench.tokenizer, block)
        histories = [self.talk.history] * max(1, len(prompts))
        shapes = jax.eval_shape(lambda: start_working(plan, eviction, batch=len(histories)))
        _, sets, finite = take_history(plan, self.params, histories, eviction, probe=probe)
        check_finite(finite)
        return Read(sets, eviction, tree_bytes(shapes), time.perf_counter() - start)

    def judged(self, plan: Plan, eviction: Eviction, prompts) -> tuple[tuple[Any, ...], int]:
        """Working sets, a sequence per prompt, of a history that was read whole."""
        key = eviction.slots, id(plan)  # layers with a sliding window are read in a plan's codes
        if key not in self.whole:
            whole = read_whole(plan, self.params, eviction, self.talk.history)
            self.whole = {key: whole}  # one at a time: it holds every token
        whole = self.whole[key]
        longest = _rounded(max(map(len, prompts)))
        parts = [
            judge(plan, self.params, eviction, whole, prompt, longest=longest) for prompt in prompts
        ]
        join = lambda *a: jnp.concatenate(a, 1)
        return jax.tree.map(join, *parts), tree_bytes(whole)

    def prompts(self, case: Case) -> list[list[int]]:
        """What judges the caches of a case, a prompt for each; none where a policy needs none."""
        encode = lambda text: self.bench.tokenizer.encode(text, bos=False)
        if case.kind == KNOWN:
            return [[*self.talk.opening, *question] for question in self.talk.questions]
        if case.kind == EPISODES:
            segments = cut(self.talk.conversation.utterances)
            of_episode = np.asarray(self.index(case.medoids, case.smooth).medoids).tolist()
            texts = [[segments[i].text for i in own if i >= 0] for own in of_episode]
            return [encode(patched_prompt(own)) for own in texts]
        if case.once and case.probes:
            return [repeat_prompt(encode, self.talk.history)]
        return []

    def make_index(self, medoids: int, smooth: float) -> EpisodeIndex:
        return make_index(
            self.bench.embedder(),
            self.talk.conversation,
            episodes=self.config.episodes,
            medoids=medoids,
            smooth=smooth,
            seed=self.config.seed,
        )

    def queries(self) -> np.ndarray:
        questions = self.talk.conversation.questions
        return embed(self.bench.embedder(), [question.text for question in questions])


def _rounded(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
