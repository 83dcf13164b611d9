"""Training through the cache: it sees what the cache shows, and learns where it may."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import Layout, Method
from kvjax.checkpoint import save
from kvjax.codecs import Centered, Codebook, Dense, Normalized
from kvjax.core.errors import InputError
from kvjax.core.pytree import same
from kvjax.generate import forward_block, init_caches, make_plan
from kvjax.models.decoder import logits
from kvjax.models.load import load
from kvjax.train import (
    Training,
    adapt,
    adapt_plan,
    init_adapter,
    load_adapter,
    quantized_hidden,
    train,
    train_saving,
)
from kvjax.train.distill import distillation_loss, full_hidden, mean_kl

TINY = Path(__file__).parents[1] / "models" / "tiny"
LAYOUT = Layout(sink=2, recent=16, page=16)


@pytest.fixture(scope="module")
def models():
    found = {name: load(TINY / name) for name in ("llama", "gemma3")}
    return {
        name: dataclasses.replace(m, config=dataclasses.replace(m.config, max_positions=4096))
        for name, m in found.items()
    }


def windows(model, count, t=128, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(3, model.config.vocab_size, t, dtype=np.int32) for _ in range(count)]


@pytest.mark.parametrize(
    ("arch", "name"), [("llama", "turboquant-3"), ("llama", "int3"), ("gemma3", "turboquant-4")]
)
def test_it_sees_what_the_packed_cache_shows(arch, name, models):
    """The training pass against the same tokens through real packed pages."""
    model = models[arch]
    method = kvjax.methods.get(name, head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    tokens = np.stack(windows(model, 2, t=112))
    hidden = jax.jit(quantized_hidden)(plan, model.params, tokens)
    caches = init_caches(plan, batch=2, capacity=112, dtype=jnp.float32)
    block, found = jax.jit(forward_block), []
    for first in range(0, 112, 16):
        piece, caches, _ = block(plan, model.params, caches, tokens[:, first : first + 16])
        found.append(piece)
    score = lambda h: np.asarray(logits(model.params, model.config, h))
    want, got = score(jnp.concatenate(found, 1)), score(hidden)
    # A number on the border of two codes may get the other one: seldom, and in later layers.
    assert np.quantile(np.abs(got - want), 0.75) < 2e-5
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
    exact = score(jnp.stack([full_hidden(model.params, model.config, t) for t in tokens]))
    assert np.abs(exact - want).max() > 10 * np.abs(got - want).max()  # and codes do show


def test_gradients_are_those_of_exact_codes(models):
    """With codes that lose nothing the loss is zero, and so is its gradient; with coarse ones the
    gradient of a learned mean is that of finite differences."""
    model = models["llama"]
    dense = Method(Dense(jnp.float32), Dense(jnp.float32), LAYOUT)
    plan = make_plan(model.config, dense)
    adapter = init_adapter(plan, model.params, rank=2, rng=jax.random.key(0))
    tokens = jnp.asarray(windows(model, 1)[0])
    loss = lambda adapter: distillation_loss(plan, model.params, adapter, tokens)
    value, gradient = jax.value_and_grad(loss)(adapter)
    assert abs(float(value)) < 1e-6
    assert max(float(abs(a).max()) for a in jax.tree.leaves(gradient)) < 1e-4
    moved = jax.tree.map(lambda a: a + 0.02, adapter)
    assert float(loss(moved)) > 1e-4  # the teacher stays what it was
    h, d = model.config.kv_heads, model.config.head_dim
    # One layer, and codes that see nothing of the vector: what is decoded is the mean.
    first = jax.tree.map(lambda a: a[:1], model.params.runs)
    params = dataclasses.replace(model.params, runs=first)
    config = dataclasses.replace(model.config, layers=1, windows=(None,))
    blind = Centered(jnp.full((h, 1, 1, d), 0.05), Normalized(Codebook(jnp.zeros(4), 2)))
    plan = make_plan(config, Method(blind, blind, LAYOUT))
    adapter = init_adapter(plan, params, rank=2, rng=jax.random.key(0), books=True)
    loss = jax.jit(lambda adapter: distillation_loss(plan, params, adapter, tokens))
    gradient = jax.grad(loss)(adapter)
    means = [i for i, a in enumerate(adapter.books) if a.ndim == 4]
    assert len(means) == 2
    for i in means:
        step = np.zeros(adapter.books[i].shape, np.float32)
        step[0, 0, 0, 3] = 0.01

        def at(sign, i=i, step=step):
            books = list(adapter.books)
            books[i] = books[i] + sign * step
            return float(loss(dataclasses.replace(adapter, books=tuple(books))))

        slope = (at(1) - at(-1)) / 0.02
        assert float(gradient.books[i][0, 0, 0, 3]) == pytest.approx(slope, rel=0.05, abs=1e-5)


@pytest.fixture(scope="module")
def trained(models):
    model = models["llama"]
    method = kvjax.methods.get("turboquant-2", head_dim=model.config.head_dim, layout=LAYOUT)
    plan = make_plan(model.config, method)
    training = Training(steps=12, rate=5e-3, rank=4, books=True, anchor=0.5)
    texts = windows(model, 3)
    return model, plan, training, texts, list(train(plan, model.params, texts, training))


def test_the_loss_falls(trained):
    model, plan, _training, texts, states = trained
    assert int(states[-1].step) == 12
    losses = np.asarray(states[-1].losses)
    assert np.isfinite(losses).all()
    start = init_adapter(plan, model.params, rank=4, rng=jax.random.key(9), books=True)
    loss = jax.jit(lambda a, t: distillation_loss(plan, model.params, a, t))
    total = lambda adapter: sum(float(loss(adapter, t)) for t in texts)
    assert total(states[-1].adapter) < 0.9 * total(start)
    # Nothing but W_K, W_V and levels has moved, and the codes keep their shapes.
    changed = adapt(states[-1].adapter, model.params)
    before, after = model.params.runs[0], changed.runs[0]
    for field in dataclasses.fields(before):
        a, b = (getattr(run, field.name) for run in (before, after))
        assert same(a, b) == (field.name not in ("wk", "wv"))
    own = adapt_plan(states[-1].adapter, plan)
    assert jax.tree.structure(own.methods) == jax.tree.structure(plan.methods)
    assert not same(own.methods, plan.methods)
    teacher, student = (full_hidden(p, model.config, texts[0]) for p in (model.params, changed))
    assert float(mean_kl(model.params, model.config, teacher, student)) > 0


def test_it_goes_on_bit_for_bit(trained):
    model, plan, training, texts, states = trained
    *_, last = train(plan, model.params, texts, training, progress=states[6])
    assert same(last, states[-1])


def test_mistakes_are_told(models):
    model = models["llama"]
    d = model.config.head_dim
    plan = make_plan(model.config, kvjax.methods.get("turboquant-2", head_dim=d, layout=LAYOUT))
    begin = lambda texts, plan=plan, **how: next(train(plan, model.params, texts, Training(**how)))
    with pytest.raises(InputError, match="windows: got none: a text that is short"):
        begin([])
    with pytest.raises(InputError, match=r"2 of \[128, 256\] tokens"):
        begin([*windows(model, 1), *windows(model, 1, t=256)])
    deep = make_plan(model.config, kvjax.methods.get("int4", head_dim=d, layout=Layout()))
    with pytest.raises(InputError, match="from 133 on"):
        begin(windows(model, 1), deep)
    with pytest.raises(InputError, match="rank: got 9999"):
        begin(windows(model, 1), rank=9999)
    with pytest.raises(InputError, match="no levels or means"):
        begin(windows(model, 1, t=256), deep, books=True)
    for name, value in (("rate", -1), ("rate", np.nan), ("anchor", np.inf), ("seed", -1)):
        with pytest.raises(InputError, match=f"{name}: got {value}"):
            Training(**{name: value})
    mixed = [kvjax.methods.get(f"int{b}", head_dim=d, layout=LAYOUT) for b in (4, 2)]
    methods = [mixed[n % 2] for n in range(model.config.layers)]
    with pytest.raises(InputError, match="methods of one structure"):
        begin(windows(model, 1), make_plan(model.config, methods))


def test_saved_trainings(trained, tmp_path):
    model, plan, training, texts, states = trained
    how = {"every": 4}
    begin = lambda folder, **other: train_saving(
        plan, model.params, texts, dataclasses.replace(training, **other), folder, **how
    )
    first = begin(tmp_path)
    for _ in range(6):  # saved after the fourth; the other two are lost
        next(first)
    first.close()
    said = []
    *_, last = train_saving(plan, model.params, texts, training, tmp_path, say=said.append, **how)
    assert said == [f"4 of 12 steps are there, in {tmp_path}"]
    assert same(last, states[-1])
    assert same(list(begin(tmp_path)), [last])
    assert same(load_adapter(tmp_path, plan, model.params), last.adapter)
    with pytest.raises(InputError, match="training"):
        next(begin(tmp_path, rate=1.0))
    with pytest.raises(InputError, match="every: got 0"):
        next(train_saving(plan, model.params, texts, training, tmp_path, every=0))
    save(tmp_path / "other", {"a": 1}, about={"model": "llama"})
    for name in ("none", "other"):
        with pytest.raises(InputError, match="no training"):
            load_adapter(tmp_path / name, plan, model.params)
    other = make_plan(model.config, kvjax.methods.get("int4", head_dim=16, layout=LAYOUT))
    with pytest.raises(InputError, match="turboquant-2"):
        load_adapter(tmp_path, other, model.params)
