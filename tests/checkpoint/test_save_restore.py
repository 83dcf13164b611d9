"""What is saved comes back bit for bit, from arrays that were used up meanwhile, or is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kvjax
from kvjax.checkpoint import Saver, peek, record, restore, save
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.generate.loop import State

LAYOUT = kvjax.Layout(sink=4, recent=16, page=16)
saving = sys.modules["kvjax.checkpoint.saver"]


@pytree
class Box:
    """Arrays of our own, as calibration has them."""

    values: jax.Array
    label: str = static(default="a")


def method(name="turboquant-3", seed=0):
    return kvjax.methods.get(name, head_dim=16, layout=LAYOUT, seed=seed)


def random_bits(tree, seed=0):
    """Any bits: what is stored does not depend on what it means."""
    rng = np.random.default_rng(seed)

    def one(a):
        return jnp.asarray(
            np.frombuffer(rng.bytes(a.size * a.dtype.itemsize), a.dtype).reshape(a.shape)
        )

    return jax.tree.map(one, tree)


def everything(seed=0):
    caches = tuple(
        random_bits(
            kvjax.init(method(), capacity=200, kv_heads=2, head_dim=16, batch=2, layers=n), seed
        )
        for n in (1, 2)
    )
    token = jnp.arange(2, dtype=jnp.int32) + seed
    state = State(caches, token, token > 0, token[None] > 0, jax.random.key(seed), jnp.int32(seed))
    return {
        "state": state,
        "method": method(seed=seed),
        "box": (Box(jnp.ones((2, 3), jnp.bfloat16) * seed), None),
        "small": jnp.full((3, 5), 1.5 + seed % 2, ml_dtypes.float8_e4m3fn),
        "rbg": jax.random.key(seed, impl="rbg"),
        "empty": jnp.zeros((0, 4), jnp.float16),
        "host": np.linspace(0, 1 + seed, 5),
        "whole": 2**40 + seed,
        "part": 0.1 + seed,
        "name": f"seed {seed}",
        "flag": bool(seed % 2),
    }


def plain(leaf):
    is_key = hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def same(a, b) -> bool:
    def one(x, y):
        if not hasattr(x, "dtype"):
            return type(x) is type(y) and x == y
        x, y = plain(x), plain(y)
        return (
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        )

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(one(x, y) for x, y in leaves)


def test_bit_for_bit(tmp_path):
    folder = tmp_path / "new" / "state"
    assert restore(folder, everything()) is None
    assert peek(folder) is None
    for seed in (1, 2, 3):
        at = save(folder, everything(seed), about={"n": seed, "layers": (1, 2)})
        back, about = restore(folder, everything(0))
        assert same(back, everything(seed))
        assert about == {"n": seed, "layers": [1, 2]} == peek(folder)[1]
        assert peek(folder)[0] == at == folder / f"{seed:06d}"
    assert isinstance(back["host"], np.ndarray)
    assert not back["state"].token.committed  # it goes where others are
    assert same(restore(folder, everything(0), number=2)[0], everything(2))
    with pytest.raises(InputError, match=r"got number 1; expected one of \[2, 3\]"):
        restore(folder, everything(0), number=1)


def test_shapes_are_enough(tmp_path):
    state = everything(4)
    arrays = {name: value for name, value in state.items() if hasattr(value, "dtype")} | {
        "state": state["state"],
        "number": jnp.float32(0.5),
    }
    save(tmp_path, arrays | {"number": 0.5})
    shapes = jax.eval_shape(lambda: arrays | {"host": jnp.zeros(5)})
    shapes["host"] = np.zeros(5)
    assert same(restore(tmp_path, shapes)[0], arrays)


def test_numbers_of_numpy(tmp_path):
    save(tmp_path, {"a": np.float32(2.5)})
    back = restore(tmp_path, {"a": np.float32(0)})[0]["a"]
    assert back == np.float32(2.5)
    assert not isinstance(back, jax.Array)


def test_state_that_is_used_up_at_once(tmp_path):
    """A step may have the buffers as soon as `save` returns, whenever they are written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    make = lambda n: {"a": jnp.full((512, 1024), n, jnp.int32), "b": np.full(7, n)}
    with Saver(tmp_path, keep=5) as own:
        state = make(0)
        for n in range(5):
            own.save(state, about={"n": n})
            state["b"] += 1  # the host's too
            state |= step({"a": state["a"]})
    for n in range(5):
        assert same(restore(tmp_path, make(9), number=n + 1)[0], make(n))


def test_it_is_written_in_the_background(tmp_path, monkeypatch):
    go = threading.Event()
    wait = lambda *args: (go.wait(20), record.write_record(*args))[1]
    monkeypatch.setattr(saving, "write_record", wait)
    with Saver(tmp_path) as own:
        own.save({"a": jnp.ones(3)})
        assert peek(tmp_path) is None
        go.set()
        own.wait()
        assert peek(tmp_path)[0].name == "000001"


def test_errors_of_the_background_are_raised(tmp_path, monkeypatch, capfd):
    """By the next call, once; what was saved before still counts, and the room is free again."""
    ones = {"a": jnp.ones(3)}

    def full(*args):
        raise OSError(28, "No space left on device")

    with Saver(tmp_path) as own:
        own.save(ones)
        own.wait()
        monkeypatch.setattr(saving, "write_record", full)
        for then in (own.wait, lambda: own.save(ones), own.close):
            own.save({"a": jnp.zeros(3)})
            with pytest.raises(InputError, match=r"No space left on device.*as it was"):
                then()
            assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["000001"]
        monkeypatch.undo()
    assert same(restore(tmp_path, ones)[0], ones)
    monkeypatch.setattr(saving, "write_record", full)

    def fails():
        with Saver(tmp_path) as own:
            own.save(ones)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        fails()
    assert "No space left" in error.value.__notes__[0]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can be written"):
        save(tmp_path / "file", ones)
    assert "Traceback" not in capfd.readouterr().err  # of orbax's threads


def test_what_orbax_cannot_write_is_told(tmp_path, capfd):
    """A file may have 1 MiB only: as a full disk, in the threads of orbax."""
    resource = pytest.importorskip("resource")
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = random_bits({"a": jnp.zeros((64, 2**16), jnp.uint16)})
    with Saver(tmp_path) as own:
        own.save({"a": jnp.ones(3)})
        own.wait()
        own.save(large)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, was[1]))
            with pytest.raises(InputError, match="a folder that does not take it"):
                own.wait() or (own.save(large) and own.wait())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, was)
        assert "Traceback" not in capfd.readouterr().err
        at = own.save({"a": jnp.ones(4)})
    assert peek(tmp_path)[0] == at
    assert same(restore(tmp_path, {"a": jnp.zeros(4)})[0], {"a": jnp.ones(4)})


def test_old_ones_leave_and_others_stay(tmp_path):
    (tmp_path / "2024").mkdir()
    (tmp_path / "000007").mkdir()
    (tmp_path / "000007" / "photo.jpg").write_text("x")
    (tmp_path / "000003").mkdir()  # an earlier run was killed here
    (tmp_path / "000003" / "arrays.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with Saver(tmp_path, keep=3) as own:
        for n in range(5):
            own.save({"n": jnp.int32(n)})
    left = {"2024", "000007", "002027", "002028", "002029", "notes.txt", "current", ".lock"}
    assert {p.name for p in tmp_path.iterdir()} == left
    assert (tmp_path / "000007" / "photo.jpg").exists()
    with pytest.raises(InputError, match="keep: got 0"):
        Saver(tmp_path, keep=0)


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with Saver(tmp_path), pytest.raises(InputError, match="another run with it under way"):
        Saver(tmp_path)
    Saver(tmp_path).close()


def test_another_state_is_refused(tmp_path):
    state = everything(1)
    save(tmp_path, state, about={"model": "a", "layout": {"page": 16}})
    changed = lambda **new: state | new
    box = state["box"][0]
    cache = kvjax.init(method(), capacity=300, kv_heads=2, head_dim=16, batch=2, layers=1)
    caches = (cache, state["state"].caches[1])
    for other, message in (
        (changed(method=method("turboquant-2")), "got .*turboquant-3.*; expected .*turboquant-2"),
        (changed(box=(dataclasses.replace(box, label="b"), None)), "expected .*'b'"),
        (changed(state=dataclasses.replace(state["state"], caches=caches)), "200.*expected .*300"),
        (changed(more=jnp.ones(2)), r"got no \['more'\]; expected the \d+ arrays"),
        ({k: v for k, v in state.items() if k != "rbg"}, r"got \['rbg'\]; expected"),
        (changed(host=np.zeros(6)), r"\['host'\] float64 \[5\]; expected float64 \[6\]"),
        (changed(host=np.zeros(5, np.float32)), "expected float32"),
        (changed(small=jnp.zeros((3, 5), ml_dtypes.float8_e5m2)), "expected float8_e5m2"),
        (changed(rbg=jax.random.key(0)), r"key<rbg> \[4\]; expected key<fry> \[2\]"),
        (changed(whole=1.5), "int .*; expected float"),
        (changed(whole=jnp.int32(0)), r"\['whole'\] int 1099511627777; expected int32 \[\]"),
        (changed(part=jnp.int32(0)), "float 1.1; expected int32"),
        (changed(name=jnp.float32(0)), "str seed 1; expected float32"),
        (changed(flag=jnp.float16(0), whole=jnp.uint8(0)), "expected uint8"),
    ):
        with pytest.raises(InputError, match=message) as error:
            restore(tmp_path, other)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    assert restore(tmp_path, state, about={"layout": {"page": 16}}) is not None
    for about, message in (
        ({"model": "b"}, "model a; expected b"),
        ({"layout": {"page": 32}}, "layout page 16; expected 32"),
        ({"weights": "x"}, "weights None; expected x"),
    ):
        with pytest.raises(InputError, match=f"got {message}"):
            restore(tmp_path, state, about=about)


@pytest.mark.parametrize("name", ["version", "kvjax", "format"])
def test_other_versions_are_refused(name, tmp_path, monkeypatch):
    if name == "kvjax":
        monkeypatch.setattr(kvjax, "__version__", "0.0.9")
    else:
        monkeypatch.setattr(record, name.upper(), "0")
    save(tmp_path, {"a": 1})
    monkeypatch.undo()
    for use in (lambda: restore(tmp_path, {"a": 1}), lambda: peek(tmp_path)):
        with pytest.raises(InputError, match=f"got {name} 0.*; expected .*name another folder"):
            use()


def test_what_cannot_be_kept_is_told(tmp_path):
    for state, message in (
        ({"f": len}, r"state, \['f'\]: got builtin_function"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"\['a'\]: got ShapeDtype"),
        ({"a": jnp.zeros(4, jnp.uint2)}, r"state, \['a'\]: got uint2"),
        ({"a": np.array(["x"])}, r"state, \['a'\]: got <U1"),
    ):
        with pytest.raises(InputError, match=message):
            save(tmp_path, state)
    with pytest.raises(InputError, match="about: got"):
        save(tmp_path, {"a": 1}, about={"x": jnp.ones(2)})
    assert peek(tmp_path) is None


def test_facts_are_plain(tmp_path):
    at = save(tmp_path, {"a": jnp.ones(3), "n": 5}, about={"why": "é"})
    facts = json.loads((at / "state.json").read_text(encoding="utf-8"))
    assert facts["about"] == {"why": "é"}
    assert facts["kvjax"] == kvjax.__version__
    files = {p.relative_to(at).as_posix() for p in (at / "arrays").rglob("*") if p.is_file()}
    assert set(facts["files"]) == files


def test_without_close(tmp_path):
    """A script that ends without `close` has saved, or is told that it has not."""
    script = f"""
import jax.numpy as jnp
from kvjax.checkpoint import Saver
saver = Saver({str(tmp_path)!r})
saver.save({{"a": jnp.ones((1024, 4096))}})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    saved = peek(tmp_path) is not None
    assert saved or "does not take it" in done.stderr
