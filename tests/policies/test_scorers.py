"""Every scorer against its formula in float64 numpy, over ragged and empty slots and GQA groups."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.core.errors import InputError
from kvjax.policies import (
    H2O,
    POLICIES,
    Chunked,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Probe,
    Random,
    Seen,
    SnapKV,
    Streaming,
    Tova,
    Weighted,
    catalyst_prompt,
    get,
    repeat_prompt,
)
from kvjax.policies.expected_attention import QueryMoments
from kvjax.policies.names import layer_budgets

B, H, G, D, S = 2, 2, 3, 8, 26
LENGTHS = (22, 13)  # tokens of each sequence so far
BLOCK = 9  # queries; the second sequence has NEW of its own, the rest is padding
NEW = (9, 4)
FREQUENCIES = 100.0 ** -(np.arange(D // 2) / (D // 2))

SNAP = {
    "snapkv": SnapKV(window=3, kernel=5),
    "snapkv-max": SnapKV(window=6, kernel=3, pool="max"),
}
SCORERS = {
    "streaming": Streaming(),
    "key-norm": KeyNorm(),
    "key-diff": KeyDiff(),
    "tova": Tova(),
    **SNAP,
    "h2o": H2O(),
    "h2o-normalized": H2O(normalized=True),
    "expected": ExpectedAttention(future=20, epsilon=0.02, sink=10),
    "chunked": Chunked(KeyNorm(), size=5),
    "probe-max": Probe(),
    "probe-mean": Probe("mean"),
    "probe-sum": Probe("sum"),
}


@functools.cache
def seen() -> Seen:
    """Slots in no order, empty ones between; heads hold other tokens (gaps), but the newest."""
    noise = np.random.default_rng(7)
    positions = np.full((B, H, S), -1)
    for b, length in enumerate(LENGTHS):
        for h in range(H):
            gone = {(b + 2 * h + 3 * n) % (length - NEW[b]) for n in range(2)}
            held = [p for p in range(length) if p not in gone]
            positions[b, h, noise.permutation(S)[: len(held)]] = held
    at = np.full((B, BLOCK), -1)
    for b, length in enumerate(LENGTHS):
        at[b, : NEW[b]] = np.arange(length - NEW[b], length)
    floats = lambda *shape: jnp.asarray(noise.normal(size=shape), jnp.float32)
    key, value, query = floats(B, H, S, D), floats(B, H, S, D), floats(B, H, G, BLOCK, D)
    mass = jnp.where(positions >= 0, jnp.abs(floats(B, H, S)), 0.0)
    ints = lambda x: jnp.asarray(x, jnp.int32)
    rates = jnp.asarray(FREQUENCIES, jnp.float32)
    return Seen(key, value, ints(positions), query, ints(at), mass, (), rates)


def told(policy, of: Seen) -> Seen:
    """What the policy sees of a layer that it meets for the first time."""
    of = dataclasses.replace(of, memory=policy.start(B, H, G, D))
    mass, memory = policy.observe(of)
    return dataclasses.replace(of, mass=mass, memory=memory)


@pytest.fixture(scope="module")
def scores(quick_jit):
    """All scorers in one compilation."""
    run = lambda of: {name: policy.score(told(policy, of)) for name, policy in SCORERS.items()}
    return {name: np.asarray(score) for name, score in quick_jit(run)(seen()).items()}


def each():
    """Batch index, head, slots that hold a token, and their positions."""
    positions = np.asarray(seen().positions)
    for b in range(B):
        for h in range(H):
            real = np.flatnonzero(positions[b, h] >= 0)
            yield b, h, real, positions[b, h][real]


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def paid(b: int, h: int, real: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Causal softmax weights `[g, new queries, real slots]`."""
    query = f64(seen().query)[b, h, :, : NEW[b]]
    logits = query @ f64(seen().key)[b, h, real].T
    at = np.arange(LENGTHS[b] - NEW[b], LENGTHS[b])
    return softmax(np.where(positions <= at[:, None], logits, -np.inf))


def streaming(b, h, real, positions):
    return positions


def key_norm(b, h, real, positions):
    return -np.sqrt((f64(seen().key)[b, h, real] ** 2).sum(-1))


def chunked(b, h, real, positions):
    norms, chunk = key_norm(b, h, real, positions), np.asarray(positions) // 5
    return np.array([norms[chunk == c].mean() for c in chunk])


def key_diff(b, h, real, positions):
    key = f64(seen().key)[b, h, real]
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return -(key @ anchor) / np.linalg.norm(key, axis=-1) / np.linalg.norm(anchor)


def snapkv(policy, b, h, real, positions):
    weight = paid(b, h, real, positions)[:, -policy.window :].sum(1).mean(0)
    by_position = np.argsort(positions)
    line = weight[by_position]
    line[positions[by_position] > LENGTHS[b] - 1 - policy.window] = 0
    half = policy.kernel // 2
    line = np.pad(line, half)
    windows = [line[i : i + policy.kernel] for i in range(len(real))]
    pooled = [w.max() if policy.pool == "max" else w.mean() for w in windows]
    out = np.empty(len(real))
    out[by_position] = pooled
    return out


def h2o(b, h, real, positions, normalized=False):
    total = f64(seen().mass)[b, h, real] + paid(b, h, real, positions).mean(0).sum(0)
    return total / (LENGTHS[b] - positions) if normalized else total


def expected(b, h, real, positions):
    policy = SCORERS["expected"]
    at = np.arange(LENGTHS[b] - NEW[b], LENGTHS[b])
    back = np.stack([rotation(-p) for p in at])
    turned = np.einsum("tij,gtj->gti", back, f64(seen().query)[b, h, :, : NEW[b]])
    turned = turned[:, at >= policy.sink]  # the second sequence loses one of its queries
    ahead = np.mean([rotation(LENGTHS[b] + n) for n in range(policy.future)], axis=0)
    key, value = f64(seen().key)[b, h, real], f64(seen().value)[b, h, real]
    judged = positions >= policy.sink
    weights = []
    for head in turned:
        mean = ahead @ head.mean(0)
        covariance = ahead @ np.cov(head.T, bias=True) @ ahead.T
        z = key @ mean + np.einsum("si,ij,sj->s", key, covariance, key) / 2
        weights.append(softmax(np.where(judged, z, -np.inf)))
    score = (np.mean(weights, axis=0) + policy.epsilon) * np.linalg.norm(value, axis=-1)
    return np.where(judged, score, np.inf)


def rotation(position: float) -> np.ndarray:
    """RoPE as a matrix: pairs (i, i + d / 2)."""
    out = np.zeros((D, D))
    for i, rate in enumerate(FREQUENCIES):
        c, s = np.cos(position * rate), np.sin(position * rate)
        j = i + D // 2
        out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def probed(reduce, b, h, real, positions):
    weight = paid(b, h, real, positions)
    if reduce == "max":
        return weight.max((0, 1))
    total = weight.mean(0).sum(0)
    first = LENGTHS[b] - NEW[b]
    return total if reduce == "sum" else total / np.minimum(NEW[b], NEW[b] - (positions - first))


ORACLES = {
    "streaming": streaming,
    "key-norm": key_norm,
    "key-diff": key_diff,
    **{name: functools.partial(snapkv, policy) for name, policy in SNAP.items()},
    "h2o": h2o,
    "h2o-normalized": functools.partial(h2o, normalized=True),
    "expected": expected,
    "chunked": chunked,
    **{f"probe-{r}": functools.partial(probed, r) for r in ("max", "mean", "sum")},
}


@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_the_formula(scores, name):
    for b, h, real, positions in each():
        want = ORACLES[name](b, h, real, positions)
        got = scores[name][b, h, real]
        pinned = np.isinf(want)  # sinks of expected attention: above all others
        assert (got[pinned] > scores[name][b][seen().positions[b] >= 10].max()).all()
        np.testing.assert_allclose(got[~pinned], want[~pinned], rtol=2e-5, atol=1e-7)


def test_tova_is_the_newest_query_over_all_heads(scores):
    """Where heads hold the same tokens, as they do under a shared policy."""
    same = seen().positions[:, :1] + jnp.zeros((B, H, 1), jnp.int32)
    got = np.asarray(jax.jit(Tova().score)(dataclasses.replace(seen(), positions=same)))
    assert Tova().shared
    for b in range(B):
        real = np.flatnonzero(np.asarray(same[b, 0]) >= 0)
        heads = [paid(b, h, real, np.asarray(same[b, 0])[real])[:, -1] for h in range(H)]
        want = np.concatenate(heads).mean(0)
        np.testing.assert_allclose(got[b, 0, real], want, rtol=2e-5)
        np.testing.assert_array_equal(got[b, 0], got[b, 1])


def test_scores_are_finite_everywhere(scores):
    for name, score in scores.items():
        assert score.shape == (B, H, S), name
        assert score.dtype == np.float32, name
        assert np.isfinite(score).all(), name


def test_a_sequence_without_new_tokens_is_no_trouble(quick_jit):
    """All of its queries are padding: scores stay finite, notes are as they were."""
    at = seen().query_positions.at[1].set(-1)
    quiet = dataclasses.replace(seen(), query_positions=at)
    run = lambda of: {name: (p.score(told(p, of)), told(p, of).mass) for name, p in SCORERS.items()}
    for name, (score, mass) in quick_jit(run)(quiet).items():
        assert np.isfinite(score).all(), name
        np.testing.assert_array_equal(mass[1], seen().mass[1], err_msg=name)


@pytest.mark.parametrize("name", ["h2o", "expected"])
def test_blocks_add_up(quick_jit, name):
    """Two blocks leave the notes of one, when nothing is evicted between them."""
    policy = SCORERS[name]

    @quick_jit
    def both(of):
        once = told(policy, of)
        cut = 4
        first = dataclasses.replace(
            of, query=of.query[..., :cut, :], query_positions=of.query_positions[:, :cut]
        )
        # Tokens of the second block are there already, but no query of the first one sees them.
        twice = told(policy, first)
        second = dataclasses.replace(
            twice, query=of.query[..., cut:, :], query_positions=of.query_positions[:, cut:]
        )
        return (once.mass, once.memory), policy.observe(second)

    once, twice = both(seen())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), once, twice)


def test_moments_survive_a_large_mean():
    """E[q q^T] - mu mu^T in float32 would lose a spread of 1 beside a mean of 3000."""
    noise = np.random.default_rng(3).normal(size=(1, 1, 1, 64, D))
    far = jnp.asarray(noise + 3000.0, jnp.float32)
    moments = ExpectedAttention().start(1, 1, 1, D)
    merge = jax.jit(QueryMoments.merge)
    for block in range(4):
        moments = merge(
            moments, far[..., 16 * block : 16 * (block + 1), :], jnp.ones((1, 16), bool)
        )
    want = np.cov(f64(far)[0, 0, 0].T, bias=True)
    np.testing.assert_allclose(moments.scatter[0, 0, 0] / moments.count[0], want, atol=2e-3)


def test_random_is_a_fair_sample_that_stays():
    """A token keeps its luck in every block and slot; old and new ones fare alike."""
    policy = Random(jax.random.key(5))
    run = jax.jit(policy.score)
    line = jnp.broadcast_to(jnp.arange(1000), (2, 2, 1000))
    ahead = dataclasses.replace(seen(), positions=line)
    behind = dataclasses.replace(seen(), positions=line[..., ::-1])
    score = np.asarray(run(ahead))
    np.testing.assert_array_equal(score, np.asarray(run(behind))[..., ::-1])
    kept = np.sort(np.argsort(-score, axis=-1)[..., :300], axis=-1)
    older = (kept < 500).sum(-1)  # hypergeometric: mean 150, deviation 7.25
    assert (abs(older - 150) < 4 * 7.25).all()
    assert len({tuple(row) for row in kept.reshape(4, -1)}) == 4


def test_weighted_adds_ranks(quick_jit):
    parts = Weighted(((KeyNorm(), 1.0), (H2O(), 0.5), (ExpectedAttention(), 0.0)))

    @quick_jit
    def run(of):
        of = told(parts, of)
        return parts.score(of), KeyNorm().score(of), of.mass

    got, norm, mass = (np.asarray(x) for x in run(seen()))
    for b, h, real, _ in each():
        ranks = [np.argsort(np.argsort(s[b, h, real])) / (len(real) - 1) for s in (norm, mass)]
        np.testing.assert_allclose(got[b, h, real], ranks[0] + 0.5 * ranks[1], rtol=1e-6)
    assert parts.needs == {"queries"}
    assert Weighted(((Tova(), 1.0), (SnapKV(window=5), 1.0))).shared
    with pytest.raises(InputError, match="each of another kind"):
        Weighted(((KeyNorm(), 1.0), (KeyNorm(), 2.0)))
    for other in (Probe(remember=True), Chunked(H2O())):  # both would write what H2O adds up
        with pytest.raises(InputError, match="one at most that notes something of every token"):
            Weighted(((H2O(), 1.0), (KeyNorm(), 1.0), (other, 1.0)))


def test_a_probe_may_remember(quick_jit):
    """The best verdict of two probes, where the second asks for something else."""
    other = dataclasses.replace(seen(), query=seen().query[:, :, ::-1] * 2 - 1)
    policy = Probe(remember=True)

    def both(one, two):
        first, _ = policy.observe(dataclasses.replace(one, mass=jnp.zeros_like(one.mass)))
        later = dataclasses.replace(two, mass=first)
        noted, memory = policy.observe(later)
        return policy.score(dataclasses.replace(later, mass=noted, memory=memory))

    plain = lambda of: np.asarray(quick_jit(Probe().score)(of))
    want = np.maximum(plain(seen()), plain(other))
    real = np.asarray(seen().real)
    assert (want > plain(other))[real].any()
    assert (want > plain(seen()))[real].any()
    got = np.asarray(quick_jit(both)(seen(), other))
    np.testing.assert_allclose(got[real], want[real], rtol=1e-5)


def test_names():
    for name in POLICIES:
        assert get(name, rng=jax.random.key(0)).window in (0, 32)
    assert get("pyramidkv", window=8) == SnapKV(window=8)
    assert layer_budgets("snapkv", 64, 3, 1000, get("snapkv")) == (64, 64, 64)
    assert layer_budgets("pyramidkv", 64, 3, 1000, get("pyramidkv"))[0] > 64
    with pytest.raises(InputError, match="streaming, h2o, tova"):
        get("snap")
    with pytest.raises(InputError, match="one of window, kernel, pool"):
        get("snapkv", windows=8)
    with pytest.raises(InputError, match="a key"):
        get("random")


@pytest.mark.parametrize(
    "make",
    [
        lambda: SnapKV(kernel=4),
        lambda: SnapKV(window=0),
        lambda: SnapKV(pool="median"),
        lambda: Probe("median"),
        lambda: ExpectedAttention(epsilon=-1.0),
    ],
)
def test_mistakes_are_told(make):
    with pytest.raises(InputError):
        make()


def test_prompts():
    letters = lambda text: [ord(c) for c in text]
    text = lambda tokens: "".join(map(chr, tokens))
    first = repeat_prompt(letters, letters("abc"), answer=letters("<a>"))
    assert text(first) == "\n\nRepeat the previous context exactly.<a>abc"
    later = repeat_prompt(letters, letters("abc"), letters("0123456789"), answer=letters("<a>"))
    assert text(later).endswith("exactly, starting with23456789<a>abc")
    assert text(repeat_prompt(letters, letters("a"), letters("0"), tail=0)).endswith("witha")
    assert text(catalyst_prompt(letters, answer=letters("<a>"))).endswith("parts.<a>")
