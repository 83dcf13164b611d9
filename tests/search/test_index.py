"""Indexes: exact search over what was decoded, whatever the order of adds, devices and files."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kvjax.codecs import QJL, Centered, Codebook, Dense, Hadamard, Linear, Normalized, Uniform
from kvjax.core.errors import InputError
from kvjax.search import Index, scan

D, PAGE = 24, 16
CODECS = {
    "dense": lambda: Dense(jnp.float32),
    "lloyd-max": lambda: turbo(),
    "centered": lambda: Centered(jnp.asarray(data(D, seed=5)), turbo()),
    "uniform per channel": lambda: Uniform(4, axis="tokens"),
    "qjl": lambda: QJL(jnp.asarray(data(32, D, seed=6))),
}
METRICS = ("ip", "l2")


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(300 + seed).normal(size=shape).astype(np.float32)


def turbo(bits: int = 3) -> Linear:
    signs = jnp.asarray(np.sign(data(D, seed=7)))
    return Linear(Hadamard(signs), Normalized(Codebook.lloyd_max(D, bits), gain="unbiased"))


@functools.cache
def built(codec: str = "lloyd-max", metric: str = "ip", count: int = 200) -> Index:
    return Index.create(CODECS[codec](), D, metric, PAGE).add(data(count, D))


def brute_force(index: Index, queries: np.ndarray) -> np.ndarray:
    """All scores in float64 from the decoded vectors."""
    x, q = np.asarray(index.decode(), np.float64), queries.astype(np.float64)
    if index.metric == "ip":
        return q @ x.T
    return -((q[:, None] - x[None]) ** 2).sum(-1)


def check(index: Index, queries: np.ndarray, k: int) -> None:
    """Scores and ids against all scores; an id may differ where scores are equal to rounding."""
    scores, ids = map(np.asarray, index.search(queries, k))
    every = brute_force(index, queries)
    tolerance = 2e-5 * np.abs(every).max()
    assert (scores.dtype, ids.dtype) == (np.float32, np.int32)
    assert all(len(set(row)) == k for row in ids)
    np.testing.assert_allclose(scores, -np.sort(-every, axis=-1)[:, :k], atol=tolerance)
    np.testing.assert_allclose(scores, np.take_along_axis(every, ids, -1), atol=tolerance)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codec", CODECS)
def test_search_is_exact_over_what_was_decoded(codec, metric):
    check(built(codec, metric), data(7, D, seed=1), k=10)


@pytest.mark.parametrize("count", [1, 16, 33])
def test_all_of_a_few_vectors(count):
    check(built("lloyd-max", "l2", count), data(3, D, seed=1), k=count)


def test_chunks_that_overlap_at_the_end(monkeypatch):
    monkeypatch.setattr(scan, "_CHUNK", 3 * PAGE * D)
    index = built(metric="l2", count=13 * PAGE)  # a shape of this test alone: traced here
    check(index, data(7, D, seed=1), k=60)  # more than a chunk holds


@pytest.mark.parametrize("metric", METRICS)
def test_decoded_vectors_are_near_and_the_tail_is_exact(metric):
    index, x = built(metric=metric), data(200, D)
    np.testing.assert_array_equal(index.decode()[192:], x[192:])
    error = np.square(np.asarray(index.decode()) - x)[:192].sum() / np.square(x[:192]).sum()
    assert 0.01 < error < 0.06
    assert (np.asarray(index.search(x, 1)[1])[:, 0] == np.arange(200)).mean() > 0.9


@pytest.mark.parametrize("metric", METRICS)
def test_adding_in_parts_is_adding_at_once(metric, monkeypatch):
    monkeypatch.setattr(scan, "pages_at_once", lambda d, page: 3)
    x, index = data(200, D), Index.create(turbo(), D, metric, PAGE)
    lengths = []
    for part in np.split(x, [1, 1, 40, 56, 57, 190]):
        index = index.add(part)
        lengths.append(len(index))
    assert index == Index.create(turbo(), D, metric, PAGE).add(x)
    assert lengths == [1, 1, 40, 56, 57, 190, 200]
    assert index.add(np.zeros((0, D))) == index
    assert index == Index.create(turbo(), D, metric, PAGE).add(jnp.asarray(x))


def test_pages_are_encoded_once():
    index = built(count=200)
    more = index.add(data(40, D, seed=2))
    for old, new in zip(jax.tree.leaves(index.pages), jax.tree.leaves(more.pages), strict=True):
        np.testing.assert_array_equal(new[:12], old)
    assert len(index) == 200  # it is a value


def test_equal_scores_come_in_the_order_of_ids():
    x = np.tile(np.arange(4)[:, None], (10, D)).astype(np.float32)  # rows 0 1 2 3 0 1 2 3 ...
    for metric, best in (("ip", 3), ("l2", 2)):
        index = Index.create(Dense(jnp.float32), D, metric, PAGE).add(x)
        _, ids = index.search(np.full((2, D), 2, np.float32), 6)
        np.testing.assert_array_equal(ids, [np.arange(6) * 4 + best] * 2)
        sharded = index.shard(mesh(), "x")
        np.testing.assert_array_equal(sharded.search(np.full((2, D), 2, np.float32), 6)[1], ids)


def test_zero_vectors_are_fine():
    index = Index.create(turbo(), D, "l2", PAGE).add(np.zeros((20, D)))
    scores, ids = index.search(np.zeros((1, D)), 20)
    np.testing.assert_array_equal(ids[0], np.arange(20))
    np.testing.assert_array_equal(scores, 0)
    assert np.isfinite(index.search(data(3, D), 20)[0]).all()


def test_search_inside_a_jit():
    index, q = built(), data(4, D, seed=1)
    scores, ids = jax.jit(lambda index, q: index.search(q, 5))(index, q)
    np.testing.assert_array_equal(ids, index.search(q, 5)[1])
    np.testing.assert_allclose(scores, index.search(q, 5)[0], atol=1e-5)


def test_compilations_are_shared():
    x, codec = data(300, 40), Uniform(4)  # 40 channels are of this test alone
    encoders, searches = scan.encode._cache_size(), scan.search._cache_size()
    for count in (48, 90, 91, 300):
        Index.create(codec, 40, "ip", PAGE).add(x[:count])
    assert scan.encode._cache_size() == encoders + 1
    for seed in range(3):  # other vectors and queries of the same shapes
        index = Index.create(codec, 40, "ip", PAGE).add(data(40, 40, seed=seed))
        index.search(data(5, 40, seed=seed + 10), 3)
    assert scan.search._cache_size() == searches + 1
    index.search(data(5, 40), 4)
    assert scan.search._cache_size() == searches + 2


def test_bits_are_true():
    index = built("lloyd-max", "ip", 160)  # whole pages
    assert index.bytes == 160 * (D * 3 // 8 + 2)
    assert index.bits_per_value == 3 + 16 / D
    assert built("lloyd-max", "l2", 160).bytes == index.bytes + 160 * 4  # |x_hat|^2
    assert built("lloyd-max", "ip", 163).bytes == index.bytes + 3 * D * 4  # exact tail
    empty = Index.create(turbo(), D, "l2", PAGE)
    assert (len(empty), empty.bytes) == (0, 0)
    assert np.isnan(empty.bits_per_value)


# --- mistakes ---


def bad_row(value, row=3):
    x = data(20, D)
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: built().search(data(2, D), 201), "k: got 201; expected 1 to 200"),
        (lambda: built().search(data(2, D), 0), "k: got 0"),
        (lambda: built().search(data(2, D), 2.0), r"k: got 2\.0"),
        (lambda: Index.create(turbo(), D).search(data(2, D), 1), "an index with vectors"),
        (lambda: built().search(data(D), 1), r"queries: got float32\[24\]; expected .* \[n, 24\]"),
        (lambda: built().search(data(2, D + 1), 1), r"queries: got float32\[2, 25\]"),
        (lambda: built().add(data(2, D - 1)), r"vectors: got float32\[2, 23\]"),
        (lambda: built().add([["a"] * D]), "vectors: got"),
        (lambda: built().add(bad_row(np.nan)), "vectors, row 3: got NaN or infinite"),
        (lambda: built().add(jnp.asarray(bad_row(np.inf))), "vectors, row 3: got NaN or inf"),
        (lambda: built().add(bad_row(1e30)), "vectors, row 3: got too long"),
        (lambda: built().search(bad_row(-np.inf, 7), 1), "queries, row 7: got NaN or infinite"),
        (lambda: Index.create(turbo(), D, "cosine"), "metric: got 'cosine'"),
        (lambda: Index.create(turbo(), 0), "dimension 0"),
        (lambda: Index.create(turbo(), D, page=True), "page True"),
        (lambda: Index.create(turbo(), D, page=10), "page: got 10 tokens"),
        (lambda: Index.create(turbo(), 32), "transform: got vectors of 32"),
        (lambda: built().shard(mesh(), "y"), "axis: got 'y'; expected one of"),
        (lambda: Index.create(per_head(), D, page=PAGE), "without an array per KV head"),
        (lambda: Index.create(Dense("float16"), D, page=PAGE).add(bad_row(1e5)), "vectors 0 to 15"),
    ],
)  # fmt: skip
def test_mistakes_are_told(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def per_head() -> Linear:
    return Linear(Hadamard(jnp.ones((3, 1, 1, D))), Uniform(4))


# --- several devices ---


def mesh(devices: int = 4) -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])


# No page, fewer pages than devices, padding and a tail, neither.
@pytest.mark.parametrize(("metric", "count"), [("ip", 5), ("l2", 48), ("ip", 200), ("l2", 128)])
def test_sharded_equals_unsharded(metric, count):
    index, q = built(metric=metric, count=count), data(5, D, seed=1)
    sharded = index.shard(mesh(), "x")
    k = min(count, 40)
    want, got = index.search(q, k), sharded.search(q, k)
    np.testing.assert_allclose(got[0], want[0], atol=2e-5)
    np.testing.assert_array_equal(got[1], want[1])
    slots = {leaf.shape[0] for leaf in jax.tree.leaves(sharded.pages)}
    assert all(n % 4 == 0 for n in slots)
    assert len(jax.tree.leaves(sharded.pages)[0].sharding.device_set) == 4
    assert len(sharded) == count


def test_a_sharded_index_is_added_to_saved_and_sharded_again(tmp_path):
    index, x = built(count=100), data(70, D, seed=3)
    sharded = index.shard(mesh(), "x")
    more = sharded.add(x)
    assert more == index.add(x).shard(mesh(), "x")
    check(more, data(4, D, seed=1), k=12)
    sharded.save(tmp_path / "index")
    assert Index.load(tmp_path / "index") == index
    assert sharded.shard(mesh(2), "x") == index.shard(mesh(2), "x")
    assert sharded.bytes >= index.bytes


def test_sharded_search_is_compiled_once():
    before = scan.search_sharded._cache_size()
    for seed in range(2):
        built(count=200).shard(mesh(), "x").search(data(5, D, seed=seed), 3)
    assert scan.search_sharded._cache_size() == before + 1


# --- files ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("metric", "count"), [("ip", 200), ("l2", 0)])
def test_save_and_load(tmp_path, codec, metric, count):
    index = built(codec, metric, count)
    index.save(tmp_path / "index.safetensors")
    back = Index.load(tmp_path / "index.safetensors")
    assert back == index
    assert jax.tree.structure(back) == jax.tree.structure(index)
    assert [p.name for p in tmp_path.iterdir()] == ["index.safetensors"]


def test_float8_codes_are_kept(tmp_path):
    index = Index.create(Dense("float8_e4m3fn"), D, page=PAGE).add(data(40, D))
    index.save(tmp_path / "index")
    assert Index.load(tmp_path / "index") == index


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "index"
    built(metric="l2").save(path)
    return path


def test_a_file_cut_short_or_with_more(saved):
    whole = saved.read_bytes()
    for data in (
        *(whole[:n] for n in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1)),
        whole + b"x",
    ):
        saved.write_bytes(data)
        with pytest.raises(InputError, match="does not open") as error:
            Index.load(saved)
        assert "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvjax.search.file.save_file", fails)
    with pytest.raises(InputError, match="No space left"):
        built().save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["index"]
    with pytest.raises(InputError, match="No such file"):
        built().save(saved.parent / "nowhere" / "index")


def rewrite(path, change) -> None:
    """The file with `change(metadata, facts, tensors)` applied."""
    with safe_open(path, framework="numpy") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    facts = json.loads(metadata["index"])
    change(metadata, facts, tensors)
    if metadata is not None and "index" in metadata:
        metadata["index"] = json.dumps(facts)
    save_file(tensors, path, metadata)


CHANGES = {
    "other version": (
        lambda m, f, t: m.update(version="2"),
        "got version '2'; expected version '1'",
    ),
    "no version": (lambda m, f, t: m.pop("version"), "got version None"),
    "other format": (lambda m, f, t: m.update(format="pt"), "got format 'pt'"),
    "no facts": (lambda m, f, t: m.pop("index"), "does not open"),
    "fact missing": (lambda m, f, t: f.pop("page"), "other facts"),
    "count negative": (lambda m, f, t: f.update(count=-1), "count -1"),
    "count another": (lambda m, f, t: f.update(count=2**30), "for pages"),
    "count true": (lambda m, f, t: f.update(count=True), "count True"),
    "page zero": (lambda m, f, t: f.update(page=0), "page 0"),
    "page other": (lambda m, f, t: f.update(page=32), "for pages"),
    "d other": (lambda m, f, t: f.update(d=32), "vectors of 32"),
    "metric unknown": (lambda m, f, t: f.update(metric=["ip"]), "metric: got"),
    "metric other": (lambda m, f, t: f.update(metric="ip"), "tensors without a place"),
    "norms missing": (lambda m, f, t: t.pop("pages.square"), "got nothing for pages.square"),
    "tail misshapen": (lambda m, f, t: t.update(tail=t["tail"][:1]), "for tail"),
    "tail of another type": (lambda m, f, t: t.update(tail=t["tail"].astype("f8")), "for tail"),
    "tensor too many": (lambda m, f, t: t.update(x=np.zeros(1)), "without a place"),
    "levels missing": (lambda m, f, t: t.pop("codec.inner.inner.levels"), "no array"),
    "levels misshapen": (
        lambda m, f, t: t.update({"codec.inner.inner.levels": np.zeros(7, "f4")}),
        "inner.inner.levels",
    ),
    "class unknown": (lambda m, f, t: f["codec"].update({"class": "eval"}), "class 'eval'"),
    "no codec": (lambda m, f, t: f.update(codec=None), "got NoneType"),
    "codec without end": (
        lambda m, f, t: f.update(
            codec=functools.reduce(lambda a, _: {"tuple": [a]}, range(200), 1)
        ),
        "as `dump` writes it",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_are_no_index(saved, name):
    change, message = CHANGES[name]
    rewrite(saved, change)
    with pytest.raises(InputError, match=message) as error:
        Index.load(saved)
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value)


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Index.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="no such file"):
        Index.load(tmp_path)
    save_file({"a": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(InputError, match=r"got format None; expected kvjax\.search\.Index"):
        Index.load(tmp_path / "weights")


def test_an_index_compares_by_value():
    assert built() == dataclasses.replace(built())
    assert built() != built(metric="l2")
    assert built() != built(count=199)
