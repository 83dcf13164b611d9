"""What each of several processes runs in test_processes.py: a generation over their devices."""

import dataclasses
import json
import sys

import jax
import numpy as np
from test_sharded import CONFIG, LAYOUT, weights

import kvjax
from kvjax.core.errors import InputError
from kvjax.generate import check_finite, generate, init_caches, make_plan
from kvjax.parallel import ShardingRules, fetch, make_mesh, place_params, start_from_environment

MAX_NEW = 50  # as in test_sharded.py, whose compilation is kept
MORE, NEXT = 3, [[1, 2, 3], [4, 5]]


def prompts():
    return [[int(t) for t in np.random.default_rng(n).integers(0, 64, n)] for n in (90, 41)]


def method():
    return kvjax.methods.get("turboquant-2", head_dim=32, layout=LAYOUT)


def load(folder: str):
    """The weights that the test has drawn: only process 0 keeps what it compiles, so drawing them
    here would cost the other one ten programs each time."""
    shapes, saved = jax.eval_shape(lambda: weights(CONFIG)), np.load(f"{folder}/weights.npz")
    return jax.tree.unflatten(
        jax.tree.structure(shapes), [saved[f"arr_{n}"] for n in range(len(saved.files))]
    )


def in_two_parts(plan, params):
    """Tokens after the prompts, and after those."""
    caches = init_caches(plan, batch=2, capacity=200)
    _, state = generate(plan, params, prompts(), max_new=MORE, caches=caches)
    return generate(plan, params, NEXT, max_new=MORE, caches=state.caches)


def told(f) -> str:
    try:
        f()
    except InputError as error:
        return str(error)
    return "no error"


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    start_from_environment()
    rules = ShardingRules(make_mesh(1, 2, 2))
    plan = make_plan(CONFIG, method(), rules=rules)
    whole = load(sys.argv[1])
    params = place_params(rules, whole, CONFIG)
    tokens, state = generate(plan, params, prompts(), max_new=MAX_NEW)
    check_finite(fetch(state.finite))
    # Sequences over processes: `generate` goes on from lengths that no process has all of.
    apart = ShardingRules(make_mesh(2, 1, 2))
    split = make_plan(CONFIG, method(), rules=apart)
    sent = place_params(apart, whole, CONFIG)
    more, last = in_two_parts(split, sent)
    check_finite(last.finite)
    pages = jax.tree.leaves(state.caches[0].key_pages)[0]
    own = dataclasses.replace(whole, final_norm=whole.final_norm * (1 + jax.process_index()))
    single = ShardingRules(make_mesh(1, 1, 1))
    found = {
        "process": jax.process_index(),
        "devices": [len(jax.devices()), len(jax.local_devices())],
        "tokens": fetch(tokens).tolist(),
        "more": fetch(more).tolist(),
        "packed": fetch(state.caches[0].packed).tolist(),
        "here": [s.data.nbytes for s in pages.addressable_shards],
        "pages": pages.nbytes,
        "sum": int(fetch(pages).astype(np.int64).sum()),
        "weights": told(lambda: place_params(rules, own, CONFIG)),
        "mesh": told(lambda: place_params(single, own, CONFIG)),
    }
    with open(f"{sys.argv[1]}/{jax.process_index()}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
