"""What a memory answers: any of its episodes, alone or beside others, before and after it grows."""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.core.errors import InputError
from kvjax.episodes import Conversation, Utterance
from kvjax.episodes.index import create, scores
from kvjax.episodes.memory import (
    Reader,
    Settings,
    _prompt,
    _put,
    _take,
    build,
    cache_of,
    remember,
    room_left,
    similarity,
)
from kvjax.episodes.prompt import patched_prompt
from kvjax.episodes.turn import fit, joined
from kvjax.generate import generate, prefill
from kvjax.models.load import load
from kvjax.models.tokenizer import Tokenizer
from kvjax.policies import Eviction, KeyNorm, Probe

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LAYOUT = kvjax.Layout(sink=4, recent=16, page=16)
NEW = 6
WORDS = [
    ["tea", "cake", "milk", "cup", "sugar", "lemon"],
    ["dog", "park", "ball", "leash", "bone", "walk"],
    ["rain", "sun", "wind", "snow", "cloud", "storm"],
]


def topics_in(texts) -> np.ndarray:
    """An embedder that knows three topics; what is of none points elsewhere."""
    counts = [[sum(t.count(w) for w in topic) for topic in WORDS] + [0.0] for t in texts]
    found = np.array(counts, np.float32)
    found[found.sum(1) == 0, 3] = 1
    return found


def talk_of(turns: int, topics=(0, 1, 2)) -> Conversation:
    """Ana and Ben, on one topic after the other."""
    rng = np.random.default_rng(0)
    said = []
    for i in range(turns):
        words = WORDS[topics[i * len(topics) // turns]]
        text = " ".join(rng.choice(words, 4))
        said.append(Utterance("Ana" if i % 2 else "Ben", text, f"D1:{i}", "1 May"))
    return Conversation("talk", tuple(said))


@pytest.fixture(scope="module")
def reader():
    model = load(TINY)
    config = dataclasses.replace(model.config, max_positions=4096, eos_ids=())
    letters = Tokenizer.of_letters(config.vocab_size)
    model = dataclasses.replace(model, config=config, tokenizer=letters)
    method = kvjax.methods.get("turboquant-3", head_dim=16, layout=LAYOUT)
    eviction = Eviction(Probe(), budget=128, block=64)
    settings = Settings(eviction, episodes=3, room=100, prompt=256)
    return Reader.create(model, method, topics_in, settings)


@pytest.fixture(scope="module")
def memory(reader):
    return build(reader, talk_of(24))


def with_settings(reader: Reader, **changes) -> Reader:
    return dataclasses.replace(reader, settings=dataclasses.replace(reader.settings, **changes))


def answer(reader: Reader, caches, prompts) -> tuple[np.ndarray, tuple]:
    prompts = [reader.tokens(p) for p in prompts]
    tokens, state = generate(
        reader.plan, reader.model.params, prompts, max_new=NEW, caches=caches, block=64
    )
    return np.asarray(tokens), state.caches


def differing(a, b) -> list[str]:
    """Names of leaves that are not equal bit for bit."""
    leaves = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    unlike = lambda x, y: not np.array_equal(np.asarray(x), np.asarray(y))
    return [jax.tree_util.keystr(path) for (path, x), y in leaves if unlike(x, y)]


def same(a, b) -> bool:
    return not differing(a, b)


def test_episodes_differ_and_hold_the_budget(reader, memory):
    assert memory.episodes == 3
    assert memory.read == len(reader.tokens("x" * memory.read))
    (cache,) = memory.caches
    held = (np.asarray(cache.kept.positions) >= 0).sum((3, 4))
    window = (np.asarray(cache.window_positions) >= 0).sum(-1)
    assert (held + window[..., None] <= 128).all()
    positions = np.asarray(cache.kept.positions)
    assert (positions[:, 0] != positions[:, 1]).any()
    assert (np.asarray(cache.length) == memory.read).all()
    assert memory.bytes() == sum(a.nbytes for a in jax.tree.leaves(memory.caches))
    for e in range(3):  # each is about one topic
        about = memory.about(e)
        assert sum(any(word in about for word in topic) for topic in WORDS) == 1


def test_together_equals_one_by_one(reader, memory):
    alone = build(with_settings(reader, together=False), talk_of(24))
    rounded = {"window_key", "window_value", "kept.key.scale", "kept.value.scale"}  # to bf16
    apart = {name.removeprefix("[0].") for name in differing(alone.caches, memory.caches)}
    assert apart <= rounded  # the codes are equal bit for bit
    for name in rounded:
        both = (operator.attrgetter(name)(m.caches[0]) for m in (alone, memory))
        a, b = (x.view(jnp.bfloat16).astype(float) for x in both)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)


def test_a_question_goes_to_its_topic(reader, memory):
    for words in WORDS:
        fits = similarity(reader, memory, " ".join(words))
        assert words[0] in memory.about(int(fits.argmax()))


def test_users_of_different_episodes_are_one_batch(reader, memory):
    """Each as if alone; parked as well; and the memory is there for the next one."""
    before = jax.device_get(memory.caches)
    prompts = ["What about tea?", "And the dog, was he in the park?", "Rain."]
    parked = memory.park()
    assert all(isinstance(a, np.ndarray) for a in jax.tree.leaves(parked.caches))
    rows = [2, 0, 1]
    batch, caches = answer(reader, cache_of(memory, rows), prompts)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        for source in (memory, parked):
            single, own = answer(reader, cache_of(source, [row]), [prompt])
            np.testing.assert_array_equal(single[0], batch[i])
            assert int(own[0].length[0, 0]) == int(caches[0].length[0, i])
    assert same(before, memory.caches)


def test_one_program_for_all_episodes(reader, memory):
    _take.clear_cache()
    _put.clear_cache()
    prefill.clear_cache()
    now = memory
    for row in range(3):
        _, caches = answer(reader, cache_of(now, [row]), ["Hello there."])
        now = remember(reader, now, row, caches, [Utterance("Ana", "dog")])
    assert _take._cache_size() == 1
    assert _put._cache_size() == 1
    assert prefill._cache_size() == 1


def test_a_turn_is_where_it_is_routed_again(reader, memory):
    """Other episodes stay as they are, and what comes next follows the turn."""
    episode = int(similarity(reader, memory, "tea").argmax())
    new, caches = answer(reader, cache_of(memory, [episode]), ["More tea?"])
    said = [Utterance("Ben", "More dog?"), Utterance("Ana", "bone")]  # another topic's words
    after = remember(reader, memory, episode, caches, said, pending=[int(new[0, -1])])
    assert after.episodes == 3
    assert after.index.labels[-1] == episode
    assert after.conversation.utterances[-2:] == tuple(said)
    assert after.pending[episode] == (int(new[0, -1]),)
    assert same(cache_of(after, [episode]), caches)
    others = [e for e in range(3) if e != episode]
    assert same(cache_of(after, others), cache_of(memory, others))
    grown = len("More tea?") + NEW - 1
    assert room_left(memory, episode) - room_left(after, episode) == grown + 1
    assert same(memory.caches, build(reader, talk_of(24)).caches)


def test_a_turn_of_another_day_begins_a_session(reader, memory):
    caches = cache_of(memory, [0])
    after = remember(reader, memory, 0, caches, [Utterance("Ana", "tea", date="2 May")])
    again = remember(
        reader, after, 0, cache_of(after, [0]), [Utterance("Ben", "cake", date="2 May")]
    )
    assert again.conversation.starts == (0, 24)


def test_a_turn_like_none_opens_an_episode(reader, memory):
    """It begins with the cache that answered, and nothing else changes."""
    _, caches = answer(reader, cache_of(memory, [1]), ["Zebras?"])
    said = [Utterance("Ana", "a zebra")]  # a direction of its own
    wide = with_settings(reader, episodes=4)
    for closed in (reader, with_settings(wide, threshold=-1.0)):  # no more, or never
        assert remember(closed, memory, 1, caches, said, pending=[5]).episodes == 3
    opened = remember(wide, memory, 1, caches, said, pending=[5])
    assert opened.episodes == opened.index.episodes == 4
    assert opened.pending == ((), (), (), (5,))
    assert same(cache_of(opened, [3]), caches)
    assert same(cache_of(opened, [0, 1, 2]), memory.caches)
    assert int(similarity(wide, opened, "zebra").argmax()) == 3
    assert opened.about(3) == 'Ana said, "a zebra"\n'
    near = [Utterance("Ana", "tea")]
    assert remember(wide, memory, 1, caches, near).episodes == 3


def test_pools_are_shared_and_survive(reader):
    """Heads that compete: pages come from one pool, which answering must not use up."""
    eviction = Eviction(KeyNorm(), budget=96, block=64, compete="layer")
    own = with_settings(reader, eviction=eviction, episodes=2)
    memory = build(own, talk_of(8, topics=(0, 1)))
    first, caches = answer(own, cache_of(memory, [0]), ["Tea?"])
    again, _ = answer(own, cache_of(memory, [0]), ["Tea?"])
    np.testing.assert_array_equal(first, again)
    after = remember(own, memory, 0, caches, [Utterance("Ana", "tea")])
    assert same(cache_of(after, [0]), caches)


def test_small_conversations(reader):
    """None, one turn, and all within the budget: one cache that has everything."""
    nothing = build(reader, Conversation("chat", ()), history="")
    assert nothing.episodes == 1
    assert nothing.index is None
    assert nothing.about(0) == ""
    assert similarity(reader, nothing, "tea").tolist() == [1]
    _, caches = answer(reader, cache_of(nothing, [0]), ["Tea?"])
    after = remember(reader, nothing, 0, caches, [Utterance("Ana", "Tea?")], pending=[3])
    assert after.index is None
    assert after.pending == ((3,),)
    one = build(reader, talk_of(1))
    assert one.episodes == one.index.episodes == 1
    (cache,) = one.caches
    kept = np.asarray(cache.kept.positions)
    window = np.asarray(cache.window_positions)
    for layer in range(kept.shape[0]):
        for head in range(kept.shape[2]):
            seen = np.concatenate([kept[layer, 0, head].ravel(), window[layer, 0]])
            assert sorted(seen[seen >= 0].tolist()) == list(range(one.read))


def test_turns_are_as_if_all_was_read_at_once(reader):
    """Within the budget and without codes: positions, and what waits to be fed, are right."""
    exact = kvjax.methods.get("bf16", head_dim=16, layout=LAYOUT)
    plain = Reader.create(reader.model, exact, topics_in, reader.settings)
    memory = build(plain, Conversation("chat", ()), history="Once.")
    ids = plain.tokens("Once.", bos=True)
    for text in ("Tea?", "And a dog?", "Rain"):
        prompt = [*memory.pending[0], *plain.tokens(text)]
        tokens, state = generate(
            plain.plan,
            plain.model.params,
            [prompt],
            max_new=NEW,
            caches=cache_of(memory, [0]),
            block=64,
        )
        new = np.asarray(tokens)[0].tolist()
        said = [Utterance("Ana", text)]
        memory = remember(plain, memory, 0, state.caches, said, pending=new[-1:])
        ids += [*plain.tokens(text), *new]
    whole, _ = generate(plain.plan, plain.model.params, [ids[:-NEW]], max_new=NEW, block=64)
    assert new == np.asarray(whole)[0].tolist()


def test_more_episodes_than_segments(reader):
    """As many as segments that differ; alike ones are one."""
    many = with_settings(reader, episodes=8)
    assert build(many, talk_of(12)).episodes == 3
    alike = Conversation("same", (Utterance("Ana", "tea and cake and milk"),) * 12)
    assert build(many, alike).episodes == 1


def test_long_prompts_of_episodes_are_shortened(reader):
    """Long utterances: each medoid has a share, and the bound on tokens holds."""
    texts = [f"{words[0]} " * 25 for words in WORDS]
    ids = _prompt(reader, texts)
    head = len(reader.tokens(patched_prompt([])))
    share = (reader.settings.prompt - head) // 3
    assert len(ids) == head + 3 * share
    decode = reader.model.tokenizer.decode
    for i, text in enumerate(texts):
        assert decode(ids[head + i * share :][:share]).replace(" ", "") in text.replace(" ", "")
    short = ["tea\n"]
    assert _prompt(with_settings(reader, prompt=400), short) == reader.tokens(patched_prompt(short))
    long = Conversation("long", tuple(Utterance("Ana", text) for text in texts for _ in range(4)))
    assert build(with_settings(reader, room=60), long).episodes == 3


def test_room_ends_at_the_positions_of_the_model(reader, memory):
    config = dataclasses.replace(reader.model.config, max_positions=memory.read + 30)
    model = dataclasses.replace(reader.model, config=config)
    near = Reader.create(model, reader.plan.methods[0], topics_in, reader.settings)
    assert room_left(build(near, talk_of(24)), 0) == 30
    assert room_left(memory, 0) >= 100
    short = dataclasses.replace(config, max_positions=100)
    model = dataclasses.replace(reader.model, config=short)
    none = Reader.create(model, reader.plan.methods[0], topics_in, reader.settings)
    with pytest.raises(InputError, match="at most the 100 positions"):
        build(none, talk_of(24))


def test_mistakes(reader, memory):
    small = with_settings(reader, eviction=Eviction(Probe(), budget=30, block=64))
    with pytest.raises(InputError, match="at least the 35 that always stay"):
        build(small, talk_of(24))
    with pytest.raises(InputError, match="numbers from 0 to 2"):
        cache_of(memory, [3])
    with pytest.raises(InputError, match="numbers from 0 to 2"):
        cache_of(memory, [])
    with pytest.raises(InputError, match="at most 100 tokens; expected 228 or more, for 3 medoids"):
        _prompt(with_settings(reader, prompt=100), ["tea " * 30] * 3)
    for name in ("episodes", "medoids", "prompt", "room"):
        with pytest.raises(InputError, match=f"{name}: got 0; expected 1 or more"):
            with_settings(reader, **{name: 0})
    bare = dataclasses.replace(reader.model, tokenizer=None)
    with pytest.raises(InputError, match="got no tokenizer"):
        Reader.create(bare, reader.plan.methods[0], topics_in, reader.settings)


def test_fit_is_scores():
    """The host's routing is the jitted one's, for every way, while the index grows."""
    rng = np.random.default_rng(3)
    unit = lambda *shape: (x := rng.normal(size=shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    index = create(unit(13, 8), 3, rng=jax.random.key(0), utterances=unit(50, 8))
    index = joined(index, unit(8).astype(np.float32), 3)  # one with a single probe
    assert index.sizes.tolist()[3] == 1
    moved = joined(index, unit(8).astype(np.float32), 0)
    members = np.asarray(moved.segments)[np.asarray(moved.labels) == 0]
    np.testing.assert_allclose(moved.centroids[0], members.mean(0), atol=1e-6)
    nowhere = joined(index, -np.asarray(index.segments)[-1], 3)  # its centroid has no direction
    assert not np.asarray(nowhere.centroids)[3].any()
    query = unit(8).astype(np.float32)
    assert fit(nowhere, query, "cosine")[3] == scores(nowhere, query)[3] == 0
    for how in ("cosine", "dot", "segments"):
        np.testing.assert_allclose(fit(moved, query, how), scores(moved, query, how), atol=1e-6)
    with pytest.raises(InputError, match="one of cosine, dot, segments"):
        fit(moved, query, "nearest")
    with pytest.raises(InputError, match=r"a vector \(7,\)"):
        joined(index, np.zeros(7, np.float32), 0)
