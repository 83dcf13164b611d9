"""Palu and Eigen Attention: bases against the papers' own decompositions, ranks, and the file."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate.joint_moments import JointMoments, measure_joint, weight_fisher
from kvjax.calibrate.low_rank import LowRankSettings, low_rank_methods, ranks_of, subspace
from kvjax.calibrate.low_rank_file import LowRankFrom, load_low_rank, save_low_rank
from kvjax.calibrate.moments import SKIP
from kvjax.calibrate.names import check_name, fitted_on, get_for_model
from kvjax.calibrate.ranks import fisher_ranks, threshold_ranks, uniform_ranks
from kvjax.codecs import Centered, Normalized, Rotary, Uniform
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.models.causal import forward, keys_and_values
from kvjax.models.config import Latent
from kvjax.models.decoder import rms_norm
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model, load

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"


@functools.cache
def model() -> Model:
    return load(TINY, dtype="float32")


@functools.cache
def windows() -> list[np.ndarray]:
    rng = np.random.default_rng(31)
    return list(rng.integers(3, model().config.vocab_size, size=(2, 128)).astype(np.int32))


@functools.cache
def moments() -> JointMoments:
    params, config = model().params, model().config
    measured = measure_joint(params, config, windows())
    return dataclasses.replace(measured, fisher=weight_fisher(params, config, windows()))


def basis_of(codec) -> np.ndarray:
    """`[groups, s d, r]` float64."""
    found = subspace(codec)
    h, _, d, rank = found.down.shape
    groups = h // found.group_heads
    return np.asarray(found.down, np.float64).reshape(groups, found.group_heads * d, rank)


@pytest.mark.parametrize("size", [1, 2])
def test_the_basis_is_that_of_the_whitened_weights(size):
    """Palu's A B = U sqrt(Sigma) sqrt(Sigma) V^T S^-1 on the weights of the first layer."""
    config, layers = model().config, model().params.runs[0]
    embedded = jnp.concatenate([model().params.embed[w[SKIP:]] for w in windows()])
    x = np.asarray(rms_norm(embedded, layers.attn_norm[0], config.norm_eps), np.float64)
    s = np.linalg.cholesky(x.T @ x)
    settings = LowRankSettings(bits=16, group_heads=size, search="uniform")
    method = low_rank_methods(moments(), settings)[0]
    assert isinstance(method.key, Rotary)
    for weight, codec in ((layers.wk[0], method.key), (layers.wv[0], method.value)):
        for i, own in enumerate(basis_of(codec)):
            width, rank = own.shape
            assert rank == width // 2
            w = np.asarray(weight, np.float64).T[i * width : (i + 1) * width]  # [s d, D]
            u, sigma, vt = np.linalg.svd(w @ s, full_matrices=False)
            a = u[:, :rank] * np.sqrt(sigma[:rank])
            b = np.sqrt(sigma[:rank])[:, None] * vt[:rank] @ np.linalg.inv(s)
            palu, ours = x @ b.T @ a.T, x @ w.T @ own @ own.T
            np.testing.assert_allclose(ours, palu, atol=1e-3 * np.abs(x @ w.T).max())
            assert np.abs(palu - x @ w.T).max() > 0.05 * np.abs(x @ w.T).max()  # it cuts something


def test_moments_are_those_of_the_keys_before_rope():
    config = model().config
    h, d = config.kv_heads, config.head_dim
    sums = np.zeros((2, config.layers, h * d, h * d))
    for tokens in windows():
        _, *pair = keys_and_values(model().params, config, jnp.asarray(tokens)[None])
        k, v = (np.asarray(a, np.float64)[:, 0, :, SKIP:] for a in pair)  # [l, h, t, d]
        for layer in range(config.layers):
            angles = (SKIP + np.arange(k.shape[2]))[:, None] * moments().frequencies[layer]
            z = (k[layer, ..., : d // 2] + 1j * k[layer, ..., d // 2 :]) * np.exp(-1j * angles)
            both = np.stack([np.concatenate([z.real, z.imag], -1), v[layer]])
            for side, a in enumerate(both):
                joint = a.transpose(1, 0, 2).reshape(-1, h * d)
                sums[side, layer] += joint.T @ joint
    for got, want in zip((moments().key, moments().value), sums / moments().tokens, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_fisher_is_the_mean_size_of_gradients_of_the_loss():
    params, config = model().params, model().config

    @jax.jit
    @jax.grad
    def gradient(pair, tokens):
        layers = dataclasses.replace(params.runs[0], wk=pair[0], wv=pair[1])
        changed = dataclasses.replace(params, runs=(layers, *params.runs[1:]))
        scores = jax.nn.log_softmax(forward(changed, config, tokens[None])[0, :-1])
        return -jnp.take_along_axis(scores, tokens[1:, None], 1).mean()

    pair = params.runs[0].wk, params.runs[0].wv
    found = [gradient(pair, jnp.asarray(tokens)) for tokens in windows()]
    squares = np.mean([np.stack(pair).astype(np.float64) ** 2 for pair in found], axis=0)
    want = np.sqrt(squares).mean((2, 3)).T
    measured = moments().fisher
    assert measured is not None
    np.testing.assert_allclose(measured[: len(want)], want, rtol=1e-3)


def test_eigen_keys_see_queries_too():
    settings = LowRankSettings(rank=0.5, bits=16, variant="eigen", search="uniform")
    method = low_rank_methods(moments(), settings)[1]
    d = moments().head_dim
    for head, own in enumerate(basis_of(method.key)):
        block = slice(head * d, (head + 1) * d)
        joint = (moments().key + moments().query)[1, block, block]
        kept = np.trace(own.T @ joint @ own)
        np.testing.assert_allclose(kept, np.linalg.eigvalsh(joint)[-d // 2 :].sum(), rtol=1e-5)
        assert kept > np.trace(basis_of(palu_at(16)[1].key)[head].T @ joint @ own) * (1 + 1e-6)


def palu_at(bits: int, **options):
    return low_rank_methods(moments(), LowRankSettings(bits=bits, search="uniform", **options))


def test_the_largest_direction_is_alike_in_all_coordinates():
    """Then the zero point of a token takes up most of the mean; 12 is no power of two."""
    for options in ({"group_heads": 2}, {"rank": 0.75}):
        own = basis_of(palu_at(4, **options)[0].value)
        plain = basis_of(palu_at(16, **options)[0].value)
        rank = own.shape[-1]
        for turned, straight in zip(own, plain, strict=True):
            np.testing.assert_allclose(turned.T @ turned, np.eye(rank), atol=1e-5)
            np.testing.assert_allclose(turned @ turned.T, straight @ straight.T, atol=1e-5)
            np.testing.assert_allclose(
                straight[:, 0] @ turned, rank**-0.5 * np.ones(rank), atol=1e-5
            )


def test_leaves():
    plain, ours = palu_at(3)[1], palu_at(3, leaf="lloyd_max")[1]
    for codec in (plain.key, plain.value):
        assert subspace(codec).inner == Uniform(3)
    for codec in (ours.key, ours.value):
        assert isinstance(subspace(codec).inner, Normalized)
    assert isinstance(ours.key, Rotary)
    assert isinstance(ours.key.inner, Centered)
    np.testing.assert_allclose(ours.key.inner.mean.ravel(), moments().key_mean[1], rtol=1e-5)
    d, mean = moments().head_dim, moments().key_mean[1]
    for head, own in enumerate(basis_of(ours.key)):
        block = slice(head * d, (head + 1) * d)
        cov = moments().key[1, block, block] - np.outer(mean[block], mean[block])
        kept = np.trace(own.T @ cov @ own)
        np.testing.assert_allclose(kept, np.linalg.eigvalsh(cov)[-d // 2 :].sum(), rtol=1e-5)


def test_fisher_ranks_share_out_one_sum():
    rng = np.random.default_rng(5)
    fisher = np.exp(2 * rng.normal(size=(30, 2)))
    for ratio in (0.2, 0.5, 0.75, 1.0):
        ranks = fisher_ranks(fisher, 64, ratio, 8)
        assert ranks.shape == (30, 2)
        assert ranks.sum() == 8 * round(ratio * 8 * 60)
        assert set(ranks.ravel()) <= set(range(8, 72, 8))
        order = ranks.ravel()[np.argsort(fisher.ravel(), kind="stable")]
        assert (np.diff(order) >= -8).all()
        free = (ranks > 8) & (ranks < 64)
        if free.sum() > 1:  # in proportion, within the rounding to a multiple
            scale = ranks[free].sum() / fisher[free].sum()
            assert (np.abs(ranks[free] - scale * fisher[free]) < 12).all()
    assert (uniform_ranks(3, 64, 0.55, 8) == 32).all()
    assert (uniform_ranks(3, 128, 0.5, 32) == 64).all()


def test_threshold_ranks_are_the_first_beyond_one_share():
    rng = np.random.default_rng(6)
    spectra = np.sort(np.exp(3 * rng.normal(size=(5, 2, 48))))[..., ::-1]  # groups of 3 heads of 16
    spectra[3, 1, 0] *= 1e8  # one direction is all there is
    ranks = threshold_ranks(spectra, 16, 0.5, 2)
    assert ranks.sum() == 80
    share = np.sqrt(spectra).cumsum(-1) / np.sqrt(spectra).sum(-1, keepdims=True)
    least = 4  # 30 % of 16, to the nearest 2
    kept = np.take_along_axis(share, 3 * ranks[..., None] - 1, -1)
    before = np.take_along_axis(share, 3 * ranks[..., None] - 7, -1)
    raised = (ranks > least)[..., None]
    assert ranks.min() == ranks[3, 1] == least
    # No matrix that was raised had a larger share before than any has now, but for the last step.
    assert np.sort(before[raised])[-1] <= kept.min() + 1e-12


def test_mistakes_are_told():
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"bits": 9}, "--bits"),
        ({"search": "best"}, "--search"),
        ({"variant": "asvd"}, "--variant"),
        ({"leaf": "polar"}, "--leaf"),
        ({"rank": 0.05}, "--rank"),
        ({"rank": 1.5}, "--rank"),
        ({"multiple": 3}, "--multiple"),
        ({"multiple": -1}, "--multiple"),
        ({"group_heads": 3}, "--group-heads"),
        ({"group_heads": 0}, "--group-heads"),
        (
            {"rank": 0.2, "search": "threshold", "multiple": 2},
            "--rank: got 0.2; expected 0.25 to 1",
        ),
    ]
    for options, word in mistakes:
        with pytest.raises(InputError, match=word):
            low_rank_methods(moments(), LowRankSettings(**options))
    with pytest.raises(InputError, match="fisher, without gradients"):
        low_rank_methods(dataclasses.replace(moments(), fisher=None), LowRankSettings())
    with pytest.raises(InputError, match="finite, positive"):
        fisher_ranks(np.array([1.0, 0.0]), 64, 0.5, 8)
    with pytest.raises(InputError, match="a multiple of 128"):
        weight_fisher(model().params, model().config, [np.zeros(100, np.int32)])
    latent = dataclasses.replace(
        model().config, arch="mla", kv_heads=1, head_dim=16, latent=Latent(8, 8, 8, 8)
    )
    with pytest.raises(InputError, match="latent attention"):
        measure_joint(model().params, latent, windows())
    with pytest.raises(InputError, match="perhaps within Rotary"):
        subspace(Uniform(4))


def test_a_file_comes_back_and_knows_its_model(tmp_path):
    config = model().config
    settings = LowRankSettings(bits=3, group_heads=2, leaf="lloyd_max")
    methods = low_rank_methods(moments(), settings)
    made = LowRankFrom(
        config.name, "abc", "some.txt", "0", 248, 128, 256, dataclasses.asdict(settings)
    )
    path = save_low_rank(methods, tmp_path, made)
    first = path.read_bytes()
    assert save_low_rank(methods, tmp_path, made).read_bytes() == first
    back, about = load_low_rank(tmp_path, config)
    assert about == made
    assert all(a.key == b.key and a.value == b.value for a, b in zip(back, methods, strict=True))
    assert (ranks_of(back) == ranks_of(methods)).all()
    name = f"lowrank:{path}"
    check_name(name, None)
    named = get_for_model(name, config, layout=Layout(recent=16, page=16))
    assert isinstance(named, tuple)
    assert {(m.name, m.layout.page) for m in named} == {(name, 16)}
    assert fitted_on(name, config) == "some.txt"
    assert fitted_on("int4", config) is None

    def refused(match, file=path, config=config):
        with pytest.raises(InputError, match=match) as error:
            load_low_rank(file, config)
        assert "\n" not in str(error.value)

    with pytest.raises(InputError, match="subspaces for the weights abc; expected"):
        fitted_on(name, config, None, model().params)
    made = dataclasses.replace(made, weights=fingerprint(model().params))
    save_low_rank(methods, tmp_path / "own", made)
    assert fitted_on(f"lowrank:{tmp_path / 'own'}", config, None, model().params) == "some.txt"
    refused("no such file", file=tmp_path / "nothing")
    refused("another-model", config=dataclasses.replace(config, name="another-model"))
    refused("layers, KV heads", config=dataclasses.replace(config, kv_heads=4))
    path.write_bytes(first[:-50])
    refused("run it again")
    path.write_bytes(first.replace(b'\\"Centered\\"', b'\\"Centaur_\\"', 1))
    refused("Centaur_")
    path.write_bytes(first.replace(b'\\"group_heads\\": 2', b'\\"group_heads\\": 0', 1))
    refused("run it again")
