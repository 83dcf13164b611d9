"""A conversation's memory: one compressed cache per episode, side by side on the batch axis."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Cache, cache_bytes, put, take
from kvjax.core.errors import InputError
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.episodes.conversation import Conversation, Utterance
from kvjax.episodes.embed import Embedder, embed
from kvjax.episodes.index import EpisodeIndex, How, create
from kvjax.episodes.prompt import context, patched_prompt
from kvjax.episodes.segment import cut
from kvjax.episodes.segment import said as line
from kvjax.episodes.turn import fit, joined, typical
from kvjax.generate.evict import ProbePrompt, pack_all, take_history
from kvjax.generate.plan import Plan, check_finite, make_plan
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model
from kvjax.policies.eviction import Eviction

_ROUND = 64  # tokens: lengths of probes are rounded up to so many, so that they share a program


@dataclasses.dataclass(frozen=True)
class Settings:
    """How conversations are remembered.

    Args:
      eviction: policy and budget of one episode's cache; with a policy that needs a probe, that is
        the episode's own prompt.
      episodes: most episodes that a conversation is clustered into.
      medoids: segments in the prompt of an episode.
      prompt: most tokens of an episode's prompt; beyond it every medoid gets an even share.
      how: what routes a question, see `index.scores`.
      threshold: a new turn whose cosine to every centroid is less opens an episode of its own.
      room: tokens of new turns that a cache takes before all is built anew.
      together: build all episodes as one batch; False takes the memory of one working set, and as
        many times as long.
      smooth: see `index.create`; conversations of up to two segments per episode are not smoothed.
      seed: of the clustering.
    Raises:
      InputError: a number that is too small; `index.create` has the other bounds.
    """

    eviction: Eviction
    episodes: int = 4
    medoids: int = 8
    prompt: int = 2048
    how: How = "segments"
    threshold: float = 0.1
    room: int = 1024
    together: bool = True
    smooth: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("episodes", "medoids", "prompt", "room"):
            if getattr(self, name) < 1:
                raise InputError(
                    name, got=getattr(self, name), expected="1 or more", fix="raise it"
                )


@dataclasses.dataclass(frozen=True)
class Reader:
    """Who reads and remembers: a model, its method of compression, an embedder and settings."""

    model: Model
    plan: Plan
    embedder: Embedder
    settings: Settings

    @classmethod
    def create(
        cls, model: Model, method: Method | Sequence[Method], embedder: Embedder, settings: Settings
    ) -> Reader:
        """Raises `InputError` for a model without a tokenizer or a method that does not fit."""
        if model.tokenizer is None:
            raise InputError(
                model.config.name,
                got="no tokenizer",
                expected="a tokenizer.json beside the weights",
                fix="add it to the folder",
            )
        return cls(model, make_plan(model.config, method), embedder, settings)

    @functools.cached_property
    def weights(self) -> str:
        """The fingerprint of the model's weights."""
        return fingerprint(self.model.params)

    @functools.cached_property
    def embedding_mark(self) -> list[float]:
        """By what embedders are told apart: D, and 16 numbers of the vector of a sentence."""
        vector = embed(self.embedder, ["The quick brown fox jumps over the lazy dog."])[0]
        return [float(len(vector)), *(round(float(x), 4) for x in vector[:16])]

    def tokens(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of a text; see `Tokenizer.encode`."""
        assert self.model.tokenizer is not None
        return self.model.tokenizer.encode(text, bos=bos)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is remembered of a conversation.

    Attributes:
      conversation: all that was said, in words; the caches hold what the budget has room for.
      index: episodes, or None while the conversation is empty.
      caches: one per group of layers, an episode per sequence of the batch.
      pending: per episode, tokens that its cache has not been fed yet.
      read: tokens of the history when the caches were built.
      firsts: of each segment of the index, its first utterance.
    """

    conversation: Conversation
    index: EpisodeIndex | None
    caches: tuple[Cache, ...]
    pending: tuple[tuple[int, ...], ...]
    read: int
    firsts: tuple[int, ...] = ()

    @property
    def episodes(self) -> int:
        """Caches side by side."""
        return len(self.pending)

    def bytes(self) -> int:
        """Bytes of all caches."""
        return sum(map(cache_bytes, self.caches))

    def park(self) -> Memory:
        """The same with its caches in host memory. What `cache_of` asks for moves back by itself,
        and `remember` moves back all."""
        return dataclasses.replace(self, caches=jax.device_get(self.caches))

    def about(self, episode: int) -> str:
        """The text of the segment that is most like an episode; "" while nothing was clustered."""
        if self.index is None:
            return ""
        at = typical(self.index, episode)
        stop = self.firsts[at + 1] if at + 1 < len(self.firsts) else None
        return "".join(map(line, self.conversation.utterances[self.firsts[at] : stop]))


def build(
    reader: Reader,
    conversation: Conversation,
    *,
    history: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Memory:
    """Reads a conversation into a memory: clusters it, then reads all of it once per episode.

    A conversation within the budget is one episode, and nothing of it is lost.

    Args:
      history: the text that the model reads; default `prompt.context` of the conversation.
    Raises:
      InputError: a conversation longer than the model's positions.

    Source: EpiCache (arXiv 2509.17396). Differs from the paper: routing by the nearest segments and
    smoothed clusters by default (see `index`), and the sink and recent tokens of the method's
    layout always stay.
    """
    settings, plan = reader.settings, reader.plan
    text = context(conversation) if history is None else history
    tokens = reader.tokens(text, bos=True)
    index = None
    firsts: tuple[int, ...] = ()
    prompts: list[list[int]] = [[]]
    if conversation.utterances:
        progress("embedding")
        index = make_index(
            reader.embedder,
            conversation,
            episodes=1 if len(tokens) <= min(settings.eviction.budgets) else settings.episodes,
            medoids=settings.medoids,
            smooth=settings.smooth,
            seed=settings.seed,
        )
        segments = cut(conversation.utterances)
        firsts = tuple(segment.first for segment in segments)
        progress(f"reading {len(tokens)} tokens for {index.episodes} episodes")
        prompts = [
            _prompt(reader, [segments[i].text for i in of if i >= 0])
            for of in np.asarray(index.medoids).tolist()
        ]
    if not tokens:  # a model without BOS, and nothing said
        tokens = reader.tokens("\n")
    caches = _read(reader, tokens, prompts, plan)
    return Memory(conversation, index, caches, ((),) * len(prompts), len(tokens), firsts)


def _prompt(reader: Reader, medoids: list[str]) -> list[int]:
    """What an episode is judged by, in no more tokens than the settings allow."""
    whole = reader.tokens(patched_prompt(medoids))
    most = reader.settings.prompt
    if len(whole) <= most:
        return whole
    head = reader.tokens(patched_prompt([]))
    share = (most - len(head)) // len(medoids)
    if share < 1:
        raise InputError(
            "prompt of an episode",
            got=f"at most {most} tokens",
            expected=f"{len(head) + len(medoids)} or more, for {len(medoids)} medoids",
            fix="raise `prompt`, or lower `medoids`",
        )
    parts = [reader.tokens(text + "\n")[:share] for text in medoids]
    return [*head, *(token for part in parts for token in part)]


def make_index(
    embedder: Embedder,
    conversation: Conversation,
    *,
    episodes: int,
    medoids: int,
    smooth: float,
    seed: int,
) -> EpisodeIndex:
    """The episodes that `build` clusters a conversation into, with the meaning of its `Settings`:
    at most as many as segments that differ."""
    segments = cut(conversation.utterances)
    vectors = embed(embedder, [segment.text for segment in segments])
    different = len(np.unique(vectors.round(6), axis=0))
    return create(
        vectors,
        min(episodes, different),
        rng=fold(jax.random.key(seed), "memory"),
        medoids=medoids,
        smooth=smooth if len(segments) > 2 * episodes else 0.0,
        utterances=embed(embedder, [u.text or "." for u in conversation.utterances]),
    )


def _read(reader: Reader, tokens: list[int], prompts: list[list[int]], plan: Plan):
    """Caches of all episodes; each has read all tokens, judged by its own prompt."""
    settings, params = reader.settings, reader.model.params
    judged = "probe" in settings.eviction.policy.needs
    prompts = [prompt or [tokens[0]] for prompt in prompts]
    longest = -(-max(map(len, prompts)) // _ROUND) * _ROUND

    def read(some: list[list[int]]):
        probe = ProbePrompt(some, longest) if judged else None
        histories = [tokens] * len(some)
        _, sets, finite = take_history(plan, params, histories, settings.eviction, probe=probe)
        check_finite(finite)
        return pack_all(plan, settings.eviction, sets, room=settings.room)

    if settings.together or len(prompts) == 1:
        return read(prompts)
    return tuple(map(_side_by_side, *(read([prompt]) for prompt in prompts)))


def _side_by_side(*caches: Cache) -> Cache:
    """Caches of one sequence each as one batch."""
    first = caches[0]
    if first.kept is not None and first.kept.table is not None:
        raise InputError(
            "episodes",
            got="caches with pools of pages, one by one",
            expected="heads and layers of one budget, or all episodes at once",
            fix='use together=True, or compete="head"',
        )
    used = None if first.kept is None else first.kept.used
    bare = [_without_used(cache) for cache in caches]
    joined = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *bare)
    if used is None or joined.kept is None:
        return joined
    most = jnp.stack([c.kept.used for c in caches if c.kept is not None]).max(0)
    return dataclasses.replace(joined, kept=dataclasses.replace(joined.kept, used=most))


def _without_used(cache: Cache) -> Cache:
    if cache.kept is None:
        return cache
    nothing: Any = None
    return dataclasses.replace(cache, kept=dataclasses.replace(cache.kept, used=nothing))


def similarity(reader: Reader, memory: Memory, text: str) -> np.ndarray:
    """How well each episode fits a text, `[E]`; what is largest is where it goes."""
    if memory.index is None:
        return np.ones(memory.episodes, np.float32)
    return fit(memory.index, embed(reader.embedder, [text])[0], reader.settings.how)


def cache_of(memory: Memory, episodes: Sequence[int]) -> tuple[Cache, ...]:
    """The caches of some episodes as a batch of their own, for one user each or for one user."""
    rows = np.asarray(list(episodes), np.int32)
    if rows.size == 0 or not 0 <= rows.min() <= rows.max() < memory.episodes:
        raise InputError(
            "episodes",
            got=list(episodes),
            expected=f"numbers from 0 to {memory.episodes - 1}, one or more",
            fix="take them from `similarity`",
        )
    if any(isinstance(a, np.ndarray) for a in jax.tree.leaves(memory.caches)):  # parked
        on_host: Any = rows
        found = tuple(take(cache, on_host) for cache in memory.caches)
        return jax.tree.map(jnp.asarray, found)
    return _take(memory.caches, jnp.asarray(rows))


@jax.jit
def _take(caches: tuple[Cache, ...], rows: jax.Array) -> tuple[Cache, ...]:
    return tuple(take(cache, rows) for cache in caches)


@jax.jit
def _put(caches, rows, parts):
    return tuple(put(cache, rows, part) for cache, part in zip(caches, parts, strict=True))


def room_left(memory: Memory, episode: int) -> int:
    """Tokens that an episode's cache can still take."""
    left = [int(c.capacity - np.asarray(c.length)[:, episode].max()) for c in memory.caches]
    for cache in memory.caches:
        if cache.kept is not None:
            most = np.asarray(cache.kept.most)[:, episode] - np.asarray(cache.length)[:, episode]
            left.append(int(most.min()))
    return min(left) - len(memory.pending[episode])


def remember(
    reader: Reader,
    memory: Memory,
    episode: int,
    caches: tuple[Cache, ...],
    said: Sequence[Utterance],
    *,
    pending: Sequence[int] = (),
) -> Memory:
    """The memory after a turn that went through an episode's cache.

    Later questions about the turn are routed to where it is: to that episode or, if it is like none
    (below the threshold) and there may be more, to one of its own, which begins with the cache that
    answered. A turn of another date begins a session.

    Args:
      caches: of `cache_of(memory, [episode])`, grown by the turn. said: the turn in words.
      pending: tokens of the turn that the caches have not been fed, such as the last one.

    Source: EpiCache (arXiv 2509.17396), stage 3b, which its released code lacks.
    """
    conversation = _with_turn(memory.conversation, said)
    index, firsts = memory.index, memory.firsts
    caches_now = jax.tree.map(jnp.asarray, memory.caches)
    row, waiting = episode, list(memory.pending)
    if index is not None and said:
        vector = embed(reader.embedder, ["".join(map(line, said))])[0]
        alike = fit(index, vector, "cosine").max()
        if alike < reader.settings.threshold and memory.episodes < reader.settings.episodes:
            rows = jnp.asarray([*range(memory.episodes), episode], jnp.int32)
            caches_now = _take(caches_now, rows)
            row = memory.episodes
            waiting.append(())
        index = joined(index, vector, row)
        firsts = (*firsts, len(memory.conversation.utterances))
    waiting[row] = tuple(pending)
    caches_now = _put(caches_now, jnp.asarray([row], jnp.int32), caches)
    return dataclasses.replace(
        memory,
        conversation=conversation,
        index=index,
        caches=caches_now,
        pending=tuple(waiting),
        firsts=firsts,
    )


def _with_turn(conversation: Conversation, said: Sequence[Utterance]) -> Conversation:
    before, starts = conversation.utterances, conversation.starts
    if before and said and said[0].date != before[-1].date:
        starts = (*starts, len(before))
    return dataclasses.replace(conversation, utterances=(*before, *said), starts=starts)
