"""What each of two processes does in test_two_savers.py: saves its part of a cache, and restores."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

import kvjax
from kvjax.checkpoint import Saver, peek, restore, save
from kvjax.core.errors import InputError
from kvjax.parallel import ShardingRules, fetch, make_mesh, start_from_environment
from kvjax.parallel.place import shardings
from kvjax.parallel.rules import cache_specs


def shapes(shards=1):
    """Of a cache, as a mesh with so many devices on its axis sequence has it."""
    axis = "sequence" if shards > 1 else None
    sizes = {"capacity": 96, "kv_heads": 2, "head_dim": 8, "batch": 2, "layers": 2}
    method = kvjax.methods.get("int4", head_dim=8, layout=kvjax.Layout(sink=2, recent=8, page=8))
    return jax.eval_shape(lambda: kvjax.init(method, **sizes, shards=shards, axis=axis))


def bits(tree):
    """Any numbers, the same in every process, with ten pages packed of each sequence."""
    draw = np.random.default_rng(0)
    made = jax.tree.map(lambda a: draw.integers(0, 99, a.shape).astype(a.dtype), tree)
    return dataclasses.replace(made, packed=np.full_like(made.packed, 10))


def like(mesh):
    rules = ShardingRules(make_mesh(*mesh))
    shape = shapes(rules.sequence)
    where = jax.tree.broadcast(shardings(rules, cache_specs(shape)), shape)
    one = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    return jax.tree.map(one, shape, where)


def placed(mesh):
    put = lambda a, s: jax.make_array_from_callback(a.shape, s.sharding, a.__getitem__)
    shape = like(mesh)
    return jax.tree.map(put, bits(shape), shape)


def told(f) -> str:
    try:
        f()
    except InputError as error:
        return str(error)
    return "no error"


def main():
    start_from_environment()
    root = Path(sys.argv[1])
    own = jax.process_index()
    cache = placed((1, 2, 2))
    state = {"cache": cache, "rng": jax.random.key(3), "n": 5, "host": np.arange(3)}
    with Saver(root / "state") as saver:
        for n in range(3):
            saver.save(state, about={"n": n})
    found = {"counts": peek(root / "state")[0].name}
    same = lambda a, b: all(map(np.array_equal, map(fetch, jax.tree.leaves(a)), jax.tree.leaves(b)))
    back, about = restore(root / "state", state | {"cache": like((1, 2, 2))})
    found["same"] = same(back["cache"], bits(shapes(2))) and about == {"n": 2} and back["n"] == 5
    found["rng"] = np.asarray(jax.random.key_data(back["rng"])).tolist()
    found["here"] = sum(s.data.nbytes for s in back["cache"].page_starts.addressable_shards)
    back, _ = restore(root / "state", state | {"cache": like((1, 1, 4))})
    found["starts"] = fetch(back["cache"].page_starts).tolist()
    # Damage that only one of the processes looks at, and a commit that fails, are told in both.
    if own == 0:
        at = peek(root / "state")[0]
        file = max((at / "arrays").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        file.write_bytes(file.read_bytes()[:-1])
        found["file"] = str(file)
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    found["damage"] = told(lambda: restore(root / "state", state | {"cache": like((1, 2, 2))}))
    if own == 0:
        sys.modules["kvjax.checkpoint.saver"].write_record = fails
    found["full"] = told(lambda: save(root / "other", state))
    found["left"] = peek(root / "other")
    (root / f"{own}.json").write_text(json.dumps(found))


def fails(*args):
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main()
