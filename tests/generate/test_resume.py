"""Prompts and generations that go on where they stopped, bit for bit, and refuse what is not theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import kvjax
from kvjax import Layout
from kvjax.checkpoint import Saver, peek
from kvjax.core.errors import InputError
from kvjax.generate import init_caches, make_plan, prefill
from kvjax.generate.evict import Keep
from kvjax.generate.loop import pad_prompts, start, step
from kvjax.generate.plan import block_size
from kvjax.generate.resume import generate_saving, prefill_saving, steps_saving
from kvjax.models.load import load
from kvjax.parallel import ShardingRules, make_mesh, place_params
from kvjax.policies import Eviction, KeyNorm

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
LAYOUT = Layout(sink=2, recent=16, page=16)
MAX_NEW = 20


@pytest.fixture(scope="module")
def model():
    found = load(TINY)
    config = dataclasses.replace(found.config, max_positions=2048)
    return dataclasses.replace(found, config=config)


@pytest.fixture(scope="module")
def prompts(model):
    draw = np.random.default_rng(5)
    return [draw.integers(3, model.config.vocab_size, n).tolist() for n in (203, 90)]


def plan_of(model, method="turboquant-3", layout=LAYOUT):
    own = kvjax.methods.get(method, head_dim=model.config.head_dim, layout=layout)
    return make_plan(model.config, own)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class Dying(Saver):
    """Its run ends at a save: once that counts, or before it does."""

    def __init__(self, folder, after: int, whole: bool = True):
        super().__init__(folder)
        self.left, self.whole = after, whole

    def save(self, state, *, about=None):
        self.left -= 1
        if self.left < 0:
            raise Killed
        at = super().save(state, about=about)
        if self.left == 0 and self.whole:
            self.wait()
            raise Killed
        return at


def same_bits(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_prompt_read_in_many_runs(model, prompts, tmp_path):
    """Bit for bit what one run without saving reads, whatever the runs before have done."""
    plan = plan_of(model)
    block = block_size(plan, 203, 16)
    tokens, lengths = pad_prompts(prompts, block)
    caches = init_caches(plan, batch=2, capacity=203 + MAX_NEW)
    want = prefill(plan, model.params, caches, tokens, lengths, block=block)
    told: list[str] = []
    options = {"every": 40, "max_new": MAX_NEW, "block": 16, "report": told.append}
    for after, whole in (1, True), (1, False), (2, True), (0, True):
        with pytest.raises(Killed), Dying(tmp_path, after, whole) as saver:
            prefill_saving(plan, model.params, prompts, saver, **options)
    with Saver(tmp_path) as saver:
        got = prefill_saving(plan, model.params, prompts, saver, **options)
        again = prefill_saving(plan, model.params, prompts, saver, **options)
    assert same_bits(got, want)
    assert same_bits(again, want)
    assert [line.split(" tokens")[0] for line in told] == [
        f"resumed: {read} of 203" for read in (48, 96, 192, 192, 203)
    ]
    assert told[0] == f"resumed: 48 of 203 tokens read, from {tmp_path / '000001'}"


def test_what_was_not_finite_is_not_forgotten(model, prompts, tmp_path):
    """Layer 0 sees tokens only: later pieces of the prompt are finite there again."""
    plan, bad = plan_of(model), 1  # in no prompt, and not what pads them
    params = dataclasses.replace(model.params, embed=model.params.embed.at[bad].set(np.nan))
    spoilt = [[bad, *prompts[0][1:]], prompts[1]]
    options = {"every": 40, "max_new": MAX_NEW, "block": 16}
    with pytest.raises(Killed), Dying(tmp_path, 2) as saver:
        prefill_saving(plan, params, spoilt, saver, **options)
    with Saver(tmp_path) as saver:
        finite = prefill_saving(plan, params, spoilt, saver, **options)[2]
    assert not finite[0].any()


def sampled(plan, params, prompts, rng, keep=None):
    """A generation that nothing saves, step by step."""
    options: dict = {"temperature": 0.8}
    options |= {"max_new": MAX_NEW, "block": 16, "rng": rng.copy(), "keep": keep}
    state = start(plan, params, prompts, **options)
    eviction = None if keep is None or keep.pack else keep.eviction
    made = [np.array(state.token)]
    for _ in range(MAX_NEW - 1):
        state = step(plan, params, state, temperature=0.8, eviction=eviction)
        made.append(np.array(state.token))
    return np.stack(made, 1), state


@pytest.mark.parametrize("kept", ["all", "packed", "exact"])
def test_a_generation_in_many_runs(kept, model, prompts, tmp_path):
    plan, rng = plan_of(model), jax.random.key(7)
    keep = None
    if kept != "all":  # heads that compete hold pools of the size that the history gave them
        eviction = Eviction(KeyNorm(), budget=64, block=32, compete="layer")
        keep = Keep(eviction, pack=kept == "packed")
    want, last = sampled(plan, model.params, prompts, rng, keep)
    told: list[str] = []
    options = {"max_new": MAX_NEW, "every": 6, "rng": rng, "temperature": 0.8, "block": 16}
    options |= {"keep": keep, "report": told.append}
    runs = ((2, True), (1, False), (12, True)) if keep is None else ((2, True),)
    for after, whole in (*runs, (1, False), (1, True)):
        with pytest.raises(Killed), Dying(tmp_path, after, whole) as saver:
            generate_saving(plan, model.params, prompts, saver, **options)
    with Saver(tmp_path) as saver:
        got, state = generate_saving(plan, model.params, prompts, saver, **options)
    np.testing.assert_array_equal(got, want)
    plain = lambda s: dataclasses.replace(s, rng=jax.random.key_data(s.rng))
    assert same_bits(plain(state), plain(last))
    made = [line.split("read")[1].split(" of")[0] for line in told]
    assert made[-3:] == [", 6", ", 12", ", 18"]
    if keep is None:
        assert told[0].startswith("resumed: 32 of 203 tokens read, from")
    with Saver(tmp_path) as saver:  # all tokens of before come first
        first, _ = next(steps_saving(plan, model.params, prompts, saver, **options))
    np.testing.assert_array_equal(first, want[:, :18])


def test_another_run_is_refused(model, prompts, tmp_path):
    plan = plan_of(model)
    options = {"max_new": 6, "every": 64, "temperature": 0.5, "rng": jax.random.key(0)}
    with Saver(tmp_path) as saver:
        generate_saving(plan, model.params, prompts, saver, **options)
        params = jax.tree.map(lambda a: a * 2, model.params)
        named = dataclasses.replace(model.config, name="other")
        renamed = make_plan(named, kvjax.methods.get("turboquant-3", head_dim=16, layout=LAYOUT))
        other_seed = kvjax.methods.get("turboquant-3", head_dim=16, layout=LAYOUT, seed=1)
        bigger = plan_of(model, layout=Layout(sink=2, recent=32, page=16))
        keep = Keep(Eviction(KeyNorm(), budget=64, block=32))
        for word, given, changed in (
            ("prompt", (plan, model.params, [prompts[0], prompts[1][:-1]]), {}),
            ("weights", (plan, params, prompts), {}),
            ("model llama; expected other", (renamed, model.params, prompts), {}),
            ("method", (plan_of(model, "turboquant-2"), model.params, prompts), {}),
            ("codec", (make_plan(model.config, other_seed), model.params, prompts), {}),
            ("layout recent 16; expected 32", (bigger, model.params, prompts), {}),
            ("max_new 6; expected 7", (plan, model.params, prompts), {"max_new": 7}),
            ("temperature 0.5; expected 0.0", (plan, model.params, prompts), {"temperature": 0.0}),
            ("rng", (plan, model.params, prompts), {"rng": jax.random.key(1)}),
            ("keep None", (plan, model.params, prompts), {"keep": keep}),
        ):
            with pytest.raises(InputError, match=f"got {word}.*name another folder") as error:
                generate_saving(*given, saver, **options | changed)
            assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="got stage decode; expected prefill"):
            prefill_saving(plan, model.params, prompts, saver, max_new=6, every=64)
        with pytest.raises(InputError, match="every: got 0"):
            prefill_saving(plan, model.params, prompts, saver, max_new=6, every=0)
    assert peek(tmp_path)[1]["made"] == 1


def test_what_is_not_ours_is_not_written_over(model, prompts, tmp_path):
    """Where a policy evicts, a run begins anew unless a generation is there: not over other things."""
    plan, keep = plan_of(model), Keep(Eviction(KeyNorm(), budget=64, block=32))
    options = {"max_new": 6, "every": 5, "keep": keep}
    with Saver(tmp_path / "own") as saver:
        at = saver.save({"a": np.ones(3)}, about={"mine": 1})
        with pytest.raises(InputError, match="got model None; expected llama"):
            generate_saving(plan, model.params, prompts, saver, **options)
        assert peek(tmp_path / "own") == (at, {"mine": 1})
    with pytest.raises(Killed), Dying(tmp_path / "half", 1) as saver:
        generate_saving(plan, model.params, prompts, saver, max_new=6, every=64)
    with Saver(tmp_path / "half") as saver, pytest.raises(InputError, match="got keep None"):
        generate_saving(plan, model.params, prompts, saver, **options)


def test_a_prompt_that_is_read_on_with_other_devices(model, prompts, tmp_path):
    """Half of it on a mesh with two devices for each KV head, the rest on one device."""
    options = {"max_new": 4, "every": 64, "block": 16, "weights": "tiny"}
    plan, told = plan_of(model), []
    with Saver(tmp_path / "one") as saver:
        want = generate_saving(plan, model.params, prompts, saver, **options)[0]
    rules = ShardingRules(make_mesh(1, 4, 2))
    method = kvjax.methods.get("turboquant-3", head_dim=16, layout=LAYOUT)
    placed = place_params(rules, model.params, model.config)
    spread = make_plan(model.config, method, rules=rules)
    name = "jax_persistent_cache_min_compile_time_secs"  # as tests/parallel/conftest.py
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    with pytest.raises(Killed), Dying(tmp_path / "many", 2) as saver:
        generate_saving(spread, placed, prompts, saver, **options)
    jax.config.update(name, before)
    with Saver(tmp_path / "many") as saver:
        options |= {"report": told.append}
        got = generate_saving(plan, model.params, prompts, saver, **options)[0]
    assert told == [f"resumed: 128 of 203 tokens read, from {tmp_path / 'many' / '000002'}"]
    np.testing.assert_array_equal(got, want)
