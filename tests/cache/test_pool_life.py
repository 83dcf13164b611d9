"""Pages that are given back: random lives of sequences against lists of what each of them holds."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exact, jit
from cases import held as without_garbage
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax
from kvjax.cache import fork, invariants, reset
from kvjax.cache.shapes import check_room

B, H, G, D = 3, 1, 1, 16
CAPACITY, BLOCK, WINDOW = 30, 4, 11
LAYOUT = kvjax.Layout(sink=1, recent=4, page=4)
POOL = 9  # a sequence takes six pages at most, or four with the window

# --- the model ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Held:
    """What a sequence holds.

    Attributes:
      tokens: numbers of the tokens. pages: one object for each page slot; forks share them.
      packed: pages ever packed. lost: whether it found no free page.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    pages: dict[int, object] = dataclasses.field(default_factory=dict)
    packed: int = 0
    lost: bool = False

    def copy(self) -> Held:
        return dataclasses.replace(self, tokens=[*self.tokens], pages={**self.pages})


class Model:
    """Sequences as lists, pages as objects that live while somebody holds them."""

    def __init__(self, slots: int):
        self.rows = [Held() for _ in range(B)]
        self.slots, self.told = slots, 0

    def used(self) -> int:
        return len({id(page) for row in self.rows for page in row.pages.values()})

    def add(self, count: list[int]) -> np.ndarray:
        """The numbers of the new tokens, `[b, block]`."""
        numbers = self.told + np.arange(B * BLOCK).reshape(B, BLOCK)
        self.told += B * BLOCK
        for row, own, n in zip(self.rows, numbers.tolist(), count, strict=True):
            row.tokens += own[:n]
        while any(waits := [self.due(row) for row in self.rows]):
            self.pack(self.rows[waits.index(max(waits))])
        return numbers

    @staticmethod
    def due(row: Held) -> int:
        past = len(row.tokens) - LAYOUT.sink - LAYOUT.recent
        return max(0, past // LAYOUT.page) - row.packed

    def pack(self, row: Held) -> None:
        slot = row.packed % self.slots
        row.packed += 1
        row.pages.pop(slot, None)
        row.lost |= self.used() == POOL
        if not row.lost:
            row.pages[slot] = object()


# --- the cache ---------------------------------------------------------------------------------


def kv_of(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[..., h, d]` of tokens by their numbers."""
    draw = np.random.default_rng(5).normal(size=(2, 2048, H, D)).astype(np.float32)
    return draw[0][numbers % 2048], draw[1][numbers % 2048]


def init(method, window=None):
    sizes = {"capacity": CAPACITY, "kv_heads": H, "head_dim": D, "batch": B, "window": window}
    return kvjax.init(method, dtype=jnp.float32, **sizes)


@jit
def extend(method, cache, k, v, count):
    return kvjax.extend(method, cache, k[:, :, :, None], k, v, count=count)[1]


@jit
def append(method, cache, k, v, active):
    return kvjax.append(method, cache, k, v, active=active)


attend = jit(kvjax.attend)
fork_jit = jit(fork)
reset_jit = jit(reset)


@jit
def reference(method, cache, k, v, q, count):
    """Attention in a contiguous cache of the same tokens, a page at a time."""

    def block(cache, part):
        k, v, first = part
        now = jnp.clip(count - first, 0, BLOCK)
        return kvjax.extend(method, cache, k[:, :, :, None], k, v, count=now)[1], None

    split = lambda a: jnp.moveaxis(a.reshape(B, -1, BLOCK, H, D), 1, 0)
    firsts = jnp.arange(0, k.shape[1], BLOCK)
    cache, _ = jax.lax.scan(block, cache, (split(k), split(v), firsts))
    return kvjax.attend(method, cache, q)


row = st.integers(0, B - 1)
OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, 1), min_size=B, max_size=B)),
    st.tuples(st.just("extend"), st.lists(st.integers(0, BLOCK), min_size=B, max_size=B)),
    st.tuples(st.just("grow"), st.lists(st.sampled_from([0, BLOCK]), min_size=B, max_size=B)),
    st.tuples(st.just("fork"), row, row),
    st.tuples(st.just("reset"), row),
    st.tuples(st.just("mask"), st.lists(st.booleans(), min_size=B, max_size=B)),
)


def do(method, cache, model: Model, operation):
    name, *given = operation
    if name == "grow":
        for _ in range(3):
            cache = do(method, cache, model, ("extend", *given))
        return cache
    if name in ("append", "extend"):
        (count,) = given
        k, v = kv_of(model.add(count))
        if name == "extend":
            return extend(method, cache, k, v, jnp.array(count, jnp.int32))
        return append(method, cache, k[:, 0], v[:, 0], jnp.array(count, bool))
    if name == "fork":
        source, target = given
        model.rows[target] = model.rows[source].copy()
        return fork_jit(cache, source, target)
    ended = [given[0] == i for i in range(B)] if name == "reset" else given[0]
    model.rows = [Held() if end else held for end, held in zip(ended, model.rows, strict=True)]
    return reset_jit(cache, given[0] if name == "reset" else jnp.array(ended))


@pytest.mark.parametrize("window", [None, WINDOW])
@settings(max_examples=25)
@given(operations=st.lists(OPERATIONS, min_size=8, max_size=40))
def test_random_lives(window, operations):
    method = exact(dataclasses.replace(LAYOUT, pool=POOL))
    plain = exact(LAYOUT)
    cache, model = init(method, window), Model(LAYOUT.page_slots(CAPACITY, window))
    fresh = init(plain, window)
    q = np.random.default_rng(6).normal(size=(B, H, G, D)).astype(np.float32)
    for operation in operations:
        cache = do(method, cache, model, operation)
        assert invariants(method, cache) == []
        assert int((cache.page_readers[0] > 0).sum()) == model.used()
        assert cache.length[0].tolist() == [len(held.tokens) for held in model.rows]
        numbers = np.zeros((B, CAPACITY + -CAPACITY % BLOCK), int)
        whole = [len(held.tokens) <= CAPACITY for held in model.rows]
        for at, held in enumerate(model.rows):
            if whole[at]:
                numbers[at, : len(held.tokens)] = held.tokens
        count = np.where(whole, cache.length[0], 0).astype(np.int32)
        want = np.array(reference(plain, fresh, *kv_of(numbers), q, count))
        ill = [held.lost or not fits for held, fits in zip(model.rows, whole, strict=True)]
        want[np.array(ill)] = np.nan
        np.testing.assert_allclose(attend(method, cache, q), want, atol=1e-5)


# --- the end of a pool -------------------------------------------------------------------------


def filled(method, lengths, *, window=None, cache=None):
    """A cache whose sequences hold tokens 0, 1, ... of their own."""
    cache = init(method, window) if cache is None else cache
    numbers = 100 * np.arange(B)[:, None] + np.arange(40)
    done = np.zeros(B, int)
    while (done < lengths).any():
        count = np.minimum(BLOCK, lengths - done)
        at = np.minimum(done[:, None] + np.arange(BLOCK), 39)
        k, v = kv_of(np.take_along_axis(numbers, at, 1))
        cache = extend(method, cache, k, v, jnp.asarray(count, jnp.int32))
        done += count
    return cache


def test_only_who_wanted_a_page_reads_as_nan():
    """Two sequences take a pool of three pages; the third gets none until one of them ends."""
    method = exact(dataclasses.replace(LAYOUT, pool=3))
    q = np.ones((B, H, G, D), np.float32)
    cache = filled(method, np.array([13, 9, 5]))  # 2 + 1 + 0 pages
    whole = attend(method, cache, q)
    assert np.isfinite(whole).all()
    tokens = kv_of(np.full((B, BLOCK), 7))

    def more(cache, row, count=BLOCK):
        return extend(method, cache, *tokens, jnp.where(jnp.arange(B) == row, count, 0))

    full = more(cache, 2)
    out = np.asarray(attend(method, full, q))
    assert np.isnan(out[2]).all()
    np.testing.assert_array_equal(out[:2], whole[:2])
    assert full.page_table[0, 2, 0] == -2
    # Its later pages take nothing from others, though there be free ones; and it stays ill.
    later = more(reset_jit(full, 0), 2)
    assert int((later.page_readers > 0).sum()) == 1
    assert np.isnan(attend(method, later, q)[2]).all()
    assert invariants(method, later) == []
    # Outside jit all that is an error, before anything is written.
    token = [a[:, 0] for a in tokens]
    only = lambda row: jnp.arange(B) == row
    with pytest.raises(kvjax.InputError, match="sequence 2, which found no free page"):
        kvjax.append(method, full, *token, active=only(2))
    ready = more(cache, 2, 3)
    with pytest.raises(kvjax.InputError, match=r"3 pages in the pool, all read; .*sequence 2"):
        kvjax.append(method, ready, *token, active=only(2))
    kvjax.append(method, full, *token, active=only(1))
    # Reset, or the target of a fork, it is well again.
    for well in (reset_jit(full, 2), fork_jit(full, 1, 2)):
        assert np.isfinite(attend(method, well, q)).all()
        assert invariants(method, well) == []


def test_what_the_check_outside_jit_foresees_is_what_happens():
    """Blocks of several pages, windows that turn over shared pages: an error just where a sequence
    would be lost under jit."""
    layout = dataclasses.replace(LAYOUT, pool=7, encode_batch=2)
    method = exact(layout)
    rng, seen = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        cache = filled(method, rng.integers(0, 26, B), window=WINDOW)
        if rng.random() < 0.7:
            cache = fork_jit(cache, *rng.permutation(B)[:2])
        if (cache.page_table == -2).any():
            continue
        k, v = kv_of(rng.integers(0, 99, (B, BLOCK)))
        count = jnp.asarray(rng.integers(0, BLOCK + 1, B), jnp.int32)
        lost = bool((extend(method, cache, k, v, count).page_table == -2).any())
        after = jnp.where(count > 0, cache.length[0] + count, 0)
        if lost:
            with pytest.raises(kvjax.InputError, match="all read"):
                check_room(cache, 0, after, layout)
        else:
            check_room(cache, 0, after, layout)
        seen[lost] += 1
    assert min(seen.values()) > 3, seen


@pytest.mark.parametrize("pool", [None, POOL])
def test_numbers_that_are_not_finite_stay_with_their_sequence(pool):
    """NaN in the first page of the pool, which is where a slot without a page would point."""
    method = exact(dataclasses.replace(LAYOUT, pool=pool))
    k, v = kv_of(np.arange(B * 13).reshape(B, 13))
    bad = np.where(np.arange(B)[:, None, None, None] == 0, np.nan, v)
    count = jnp.array([13, 9, 3], jnp.int32)  # 2 + 1 + 0 pages
    q = np.ones((B, H, G, D), np.float32)
    cache = extend(method, init(method), k, bad, count)
    out = attend(method, cache, q)
    assert np.isnan(out[0]).all()
    clean = attend(method, extend(method, init(method), k, v, count), q)
    np.testing.assert_array_equal(out[1:], clean[1:])
    for rows in (0, jnp.arange(B) == 0):  # when the sequence has ended, they are forgotten
        again = np.asarray(attend(method, reset(cache, rows), q))
        np.testing.assert_array_equal(again[1:], clean[1:])
        assert (again[0] == 0).all()


# --- reset -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, POOL])
def test_a_reset_sequence_is_as_new(pool):
    """Bit for bit the cache in which it never was; others are not touched."""
    method = exact(dataclasses.replace(LAYOUT, pool=pool))
    cache = without_garbage(filled(method, np.array([9, 0, 14])))
    both = filled(method, np.array([9, 13, 14]))
    for rows in (1, -2, [1], np.array([False, True, False]), jnp.array([1, 1])):
        left = without_garbage(reset(both, rows))
        assert invariants(method, left) == []
        for name in ("length", "packed", "window_positions", "window_key", "window_value"):
            np.testing.assert_array_equal(getattr(left, name), getattr(cache, name), err_msg=name)
        if pool is None:
            jax.tree.map(np.testing.assert_array_equal, left, cache)
        else:
            assert int((left.page_readers > 0).sum()) == int((cache.page_readers > 0).sum()) == 3
            assert (np.asarray(left.page_table[0, 1]) == -1).all()
    nobody = reset(both, np.zeros(B, bool))
    jax.tree.map(np.testing.assert_array_equal, nobody, both)


@pytest.mark.parametrize("pool", [None, POOL])
def test_one_source_for_several_targets(pool):
    """As many layers as targets: neither axis is taken for the other."""
    method = exact(dataclasses.replace(LAYOUT, pool=pool))
    sizes = {"capacity": CAPACITY, "kv_heads": H, "head_dim": D, "batch": B, "layers": 2}
    cache = kvjax.init(method, dtype=jnp.float32, **sizes)
    for layer in range(2):
        k, v = kv_of(np.arange(B * 3).reshape(B, 3) + 50 * layer)
        cache = kvjax.prefill(method, cache, k, v, layer=layer)[1]
    once = fork(fork(cache, 0, 1), 0, 2)
    for source, target in ((0, [1, 2]), ([0], np.array([1, 2])), ([0, 0], jnp.array([-2, 2]))):
        jax.tree.map(np.testing.assert_array_equal, fork(cache, source, target), once)
    assert (np.asarray(once.window_key[0]) != np.asarray(once.window_key[1])).any()
    with pytest.raises(kvjax.InputError, match="got 2 sources for 1 targets"):
        fork(cache, [0, 1], 2)


def test_sizes_and_counts_that_are_not_there():
    method = exact(LAYOUT)
    for name in ("capacity", "kv_heads", "batch", "layers"):
        sizes = {"capacity": CAPACITY, "kv_heads": H, "head_dim": D} | {name: 0}
        with pytest.raises(kvjax.InputError, match=f"{name}: got 0; expected 1 or more"):
            kvjax.init(method, **sizes)
    cache, (k, v) = init(method), kv_of(np.arange(B * 3).reshape(B, 3))
    for count, says in (
        ([4, 0, 0], r"count: got \[4, 0, 0\]; expected 0 to the 3 tokens"),
        ([-1, 0, 0], r"count: got \[-1, 0, 0\]"),
        ([2], r"count: got int32 of shape \(1,\)"),
        (2, r"count: got int32 of shape \(\)"),
        ([1.0, 2.0, 3.0], "count: got float32"),
    ):
        with pytest.raises(kvjax.InputError, match=says):
            kvjax.extend(method, cache, k[:, :, :, None], k, v, count=jnp.asarray(count))
    with pytest.raises(kvjax.InputError, match=r"active: got bool of shape \(2,\)"):
        kvjax.append(method, cache, k[:, 0], v[:, 0], active=[True, False])
    with pytest.raises(kvjax.InputError, match="block: got -4"):
        kvjax.prefill(method, cache, k, v, block=-4)


def test_rows_that_are_not_there():
    method = exact(dataclasses.replace(LAYOUT, pool=POOL))
    cache = init(method)
    jax.tree.map(np.testing.assert_array_equal, reset(cache, []), cache)
    for rows in (1.5, [[0, 1]]):
        with pytest.raises(kvjax.InputError, match=r"rows: got .*; expected one index"):
            reset(cache, rows)
    with pytest.raises(kvjax.InputError, match=r"rows: got bool of shape \(3,\)"):
        fork(cache, 0, np.array([False, True, True]))
    with pytest.raises(kvjax.InputError, match="rows: got 3; expected sequences 0 to 2"):
        reset(cache, 3)
    with pytest.raises(kvjax.InputError, match=r"a mask of shape \(2,\)"):
        reset(cache, [True, False])


@pytest.mark.parametrize("pool", [None, POOL])
@pytest.mark.parametrize("change", ["reset", "mask", "fork"])
def test_in_place(change, pool):
    """Donated, all bytes of the cache are those of the result, and no copy of its pages is made."""
    method = exact(dataclasses.replace(LAYOUT, pool=pool and 4000))
    sizes = {"capacity": 4000, "kv_heads": H, "head_dim": D, "batch": 8, "layers": 2}
    cache = jax.eval_shape(lambda: kvjax.init(method, **sizes))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    mask = jax.ShapeDtypeStruct((8,), bool)
    f, args = {"reset": (reset, (index,)), "mask": (reset, (mask,)), "fork": (fork, (index,) * 2)}[
        change
    ]
    memory = jax.jit(f, donate_argnums=0).lower(cache, *args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kvjax.cache_bytes(cache)
    pages = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache.key_pages))
    # The pages of a sequence, keys and values; the index of a scatter per entry of the table.
    assert memory.temp_size_in_bytes < 2 * pages / 8 + 16 * 2 * 8 * 1000


def test_a_step_is_in_place():
    method = exact(dataclasses.replace(LAYOUT, pool=4000))
    sizes = {"capacity": 4000, "kv_heads": H, "head_dim": D, "batch": 8, "layers": 2}
    cache = jax.eval_shape(lambda: kvjax.init(method, **sizes))
    kv = jax.ShapeDtypeStruct((8, H, D), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    one = lambda cache, k, v, layer: kvjax.append(method, cache, k, v, layer=layer)
    memory = jax.jit(one, donate_argnums=0).lower(cache, kv, kv, layer).compile().memory_analysis()
    assert memory.alias_size_in_bytes == kvjax.cache_bytes(cache)
    assert memory.temp_size_in_bytes < 200_000  # the pool's pages take 8 MB


# --- invariants --------------------------------------------------------------------------------


def test_what_is_broken_is_told():
    method = exact(dataclasses.replace(LAYOUT, pool=POOL))
    cache = filled(method, np.array([9, 13, 14]))
    assert cache.page_table[0, :, :3].tolist() == [[0, -1, -1], [1, 3, -1], [2, 4, -1]]
    change = lambda name, at, value: dataclasses.replace(
        cache, **{name: getattr(cache, name).at[at].set(value)}
    )
    for name, at, value, says in (
        ("length", (0, 0), 8, "sequence 0 has packed 1 pages at length 8"),
        ("packed", (0, 2), 3, "sequence 2 has packed 3 pages at length 14"),
        ("window_positions", (0, 1, 2), 3, "sequence 1 has other positions in its window"),
        ("page_table", (0, 1, 1), 2, "page 3 counts 1 readers, and 0 name it"),
        ("page_table", (0, 1, 2), 3, "slot 2 of sequence 1 starts at 5, not -1"),
        ("page_table", (0, 1, 2), -2, "slot 2 of sequence 1 starts at -2, not -1"),
        ("page_table", (0, 0, 0), POOL, f"the page table names page {POOL} of {POOL}"),
        ("page_readers", (0, 7), 1, "page 7 counts 1 readers, and 0 name it"),
        ("page_starts", (0, 3), 9, "slot 1 of sequence 1 starts at 9, not 5"),
        ("page_starts", (0, 7), 1, "page 7 is free and starts at 1"),
    ):
        found = invariants(method, change(name, at, value))
        assert any(says in line for line in found), (name, at, value, found)
        assert all(line.startswith("layer 0: ") for line in found)
    plain = filled(exact(LAYOUT), np.array([9, 13, 14]))
    shifted = dataclasses.replace(plain, page_starts=plain.page_starts + 1)
    assert "slot 0 of sequence 0 starts at 2, not 1" in invariants(exact(LAYOUT), shifted)[0]
