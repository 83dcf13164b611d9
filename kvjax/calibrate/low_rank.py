"""Keys and values by their coordinates in fixed subspaces: Palu and Eigen Attention, packed."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from kvjax.calibrate.joint_moments import JointMoments
from kvjax.calibrate.ranks import (
    check_ratio,
    default_multiple,
    fisher_ranks,
    least_rank,
    threshold_ranks,
    uniform_ranks,
)
from kvjax.codecs import Centered, Codebook, Dense, Normalized, Rotary, Subspace, Uniform
from kvjax.codecs.transforms import hadamard_transform
from kvjax.core.codec import Codec
from kvjax.core.errors import InputError, known
from kvjax.core.method import Method

Variant = Literal["palu", "eigen"]
Search = Literal["fisher", "uniform", "threshold"]
Leaf = Literal["uniform", "lloyd_max"]


@dataclasses.dataclass(frozen=True)
class LowRankSettings:
    """What `low_rank_methods` makes.

    Attributes:
      rank: mean share of the channels that is kept, over keys and values of all layers.
      bits: 1 to 8 per coordinate, or 16 for bf16 ones, as they are without quantization.
      group_heads: KV heads that share coordinates.
      search: how ranks differ: by "fisher" (Palu), "threshold" (Eigen Attention), or not.
      variant: whose basis keys have.
      leaf: of the coordinates: "uniform" is a grid per token with a scale and a zero point, as in
        Palu; "lloyd_max" is TurboQuant's, a length per token and Lloyd-Max levels, and keys have
        their mean taken out first.
      multiple: that ranks per head are multiples of; 0 is `default_multiple`.
    """

    rank: float = 0.5
    bits: int = 4
    group_heads: int = 1
    search: Search = "fisher"
    variant: Variant = "palu"
    leaf: Leaf = "uniform"
    multiple: int = 0

    def __post_init__(self):
        for name, choices in (("search", Search), ("variant", Variant), ("leaf", Leaf)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"--{name}",
                    got=repr(getattr(self, name)),
                    expected=known(get_args(choices)),
                    fix="name one of them",
                )
        if self.bits not in (*range(1, 9), 16):
            raise InputError(
                "--bits", got=self.bits, expected="1 to 8, or 16", fix="choose such a width"
            )

    def check(self, heads: int, head_dim: int) -> None:
        """Raises `InputError` for a rank, multiple or group that KV heads of that number and size
        do not allow."""
        if self.group_heads < 1 or heads % self.group_heads:
            raise InputError(
                "--group-heads",
                got=self.group_heads,
                expected=f"a divisor of the {heads} KV heads of a layer",
                fix=f"use {heads} for all of them, or 1",
            )
        multiple = self.multiple_of(head_dim)
        least = least_rank(head_dim, multiple) if self.search == "threshold" else 0
        check_ratio(head_dim, self.rank, multiple, least)

    def multiple_of(self, head_dim: int) -> int:
        """What ranks per head are multiples of."""
        return default_multiple(head_dim) if self.multiple == 0 else self.multiple


def low_rank_methods(moments: JointMoments, settings: LowRankSettings) -> tuple[Method, ...]:
    """One method per layer.

        keys:   Rotary(Subspace(top eigenvectors of E[k k^T]))     k before RoPE
        values: Subspace(top eigenvectors of E[v v^T])

    **Palu** takes the singular value decomposition of the whitened weights, `W S = U Sigma V^T`
    with `S S^T = E[x x^T]` for inputs x and `k = W x`, and keeps `A = U sqrt(Sigma)`,
    `B = sqrt(Sigma) V^T S^-1`, cut at rank r: the cache holds `B x`, and `A B x` is what attention
    sees. The two are one projection,

        A B = U_r Sigma_r V_r^T S^-1 = U_r U_r^T W,

    and U are the eigenvectors of `W S S^T W^T = E[k k^T]`. So no weights are needed, only the
    second moments of keys before RoPE and of values, over the heads that share coordinates; and
    where there is a bias, or a norm after the projection, the same basis is the best one for what
    is cached, which the decomposition of W would miss.

    **Eigen Attention** has keys in the top singular directions of keys and queries stacked, that
    is, eigenvectors of `E[k k^T] + sum over queries of E[q q^T]`. Before RoPE, as its keys are kept
    in such models, a query is seen by a key turned by their distance, so the joint basis is exact
    for tokens at distance 0 only. Values are as in Palu.

    Quantized coordinates are turned by a Hadamard transform that is folded into the basis, so that
    no coordinate stands out; where the rank is no power of two it is a Kronecker product with a
    cosine transform. The largest direction, most of which is the mean, becomes the same number in
    every coordinate, which the zero point of a token takes up. Lloyd-Max levels have no zero point:
    there keys are coded less their mean before RoPE, in the top directions of their covariance.
    Values keep theirs: without it the best subspace of SmolLM2's values has 1.5 times the KL.

    Neither method moves any work into the weights here. Palu folds `U_r` of values into W_O, and
    both compute coordinates straight from x: `Subspace.restore` does the one per step, at
    `2 d r` operations a head, and `encode` the other per page. A model whose values have r channels
    and whose keys have d is not one that kvjax's caches are made for.

    Args:
      moments: with Fisher information, where the search needs it.
    Raises:
      InputError: a rank, group, multiple or search that the moments do not allow.

    Source: Palu, arXiv 2407.21118; Eigen Attention, arXiv 2408.05646.
    Differs from the papers: bases are fitted to the tokens from position 4 of each window on, since
      sinks stay exact; all heads of a layer have the same rank, a multiple of a quarter of the head
      by default; codes are really packed, and exact windows are kept.
    """
    h, d, size = moments.heads, moments.head_dim, settings.group_heads
    settings.check(h, d)
    key_second, value_second = _second_moments(moments, settings)
    bases = [eigenbasis(a, h, size) for a in (key_second, value_second)]
    ranks = _ranks(moments, settings, [spectrum for _, spectrum in bases])
    methods = []
    for layer, (key_rank, value_rank) in enumerate(ranks):
        key_basis, value_basis = (vectors[layer] for vectors, _ in bases)
        key: Codec = _coded(key_basis[..., : size * key_rank], settings)
        if settings.leaf == "lloyd_max":
            mean = moments.key_mean[layer].reshape(h, 1, 1, d)
            key = Centered(jnp.asarray(mean, jnp.float32), key)
        key = Rotary(jnp.asarray(moments.frequencies[layer], jnp.float32), key)
        value = _coded(value_basis[..., : size * value_rank], settings)
        methods.append(Method(key, value, name=f"{settings.variant}-{settings.bits}"))
    return tuple(methods)


def eigenbasis(second: np.ndarray, heads: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of second moments by groups of `size` heads, those of the largest first.

    Args:
      second: `[l, h d, h d]`, of which the blocks of the groups are looked at.
    Returns:
      Vectors `[l, G, s d, s d]` as columns, and eigenvalues `[l, s d]` summed over the groups.
    """
    groups, width = heads // size, second.shape[-1] // heads * size
    blocks = second.reshape(len(second), groups, width, groups, width)
    blocks = np.stack([blocks[:, i, :, i] for i in range(groups)], 1)  # [l, G, s d, s d]
    values, vectors = np.linalg.eigh((blocks + blocks.swapaxes(-1, -2)) / 2)
    return vectors[..., ::-1], np.maximum(values[..., ::-1], 0).sum(1)


def ranks_of(methods: tuple[Method, ...]) -> np.ndarray:
    """`[l, 2]`: coordinates of keys and of values, of a group by its heads.

    Raises:
      InputError: a method that `low_rank_methods` has not made.
    """
    found = [[subspace(codec) for codec in (m.key, m.value)] for m in methods]
    return np.array([[one.down.shape[-1] / one.group_heads for one in pair] for pair in found])


def subspace(codec: Codec) -> Subspace:
    """The subspace in the codec of one side."""
    while not isinstance(codec, Subspace):
        if not isinstance(codec, Rotary | Centered):
            raise InputError(
                "low-rank codec",
                got=type(codec).__name__,
                expected="a Subspace, perhaps within Rotary or Centered",
                fix="make it with low_rank_methods",
            )
        codec = codec.inner
    return codec


def _second_moments(
    moments: JointMoments, settings: LowRankSettings
) -> tuple[np.ndarray, np.ndarray]:
    """`[l, h d, h d]` of keys and values, whose largest directions are kept; of keys about the mean
    where that is taken out first."""
    key, mean = moments.key, moments.key_mean
    if settings.leaf == "lloyd_max":
        key = key - mean[:, :, None] * mean[:, None]
    return (key + moments.query if settings.variant == "eigen" else key), moments.value


def _ranks(
    moments: JointMoments, settings: LowRankSettings, spectra: list[np.ndarray]
) -> np.ndarray:
    """`[l, 2]` ranks per head."""
    d, layers = moments.head_dim, len(moments.key)
    multiple = settings.multiple_of(d)
    if settings.search == "uniform":
        return uniform_ranks(2 * layers, d, settings.rank, multiple).reshape(layers, 2)
    if settings.search == "threshold":
        return threshold_ranks(np.stack(spectra, 1), d, settings.rank, multiple)
    if moments.fisher is None:
        raise InputError(
            "--search",
            got="fisher, without gradients",
            expected="what the weights of each layer matter",
            fix="give --gradients, or use --search uniform",
        )
    return fisher_ranks(moments.fisher, d, settings.rank, multiple)


def _coded(basis: np.ndarray, settings: LowRankSettings) -> Subspace:
    """The codec of one side of a layer, for a basis `[G, s d, r]`."""
    size, bits = settings.group_heads, settings.bits
    rank = basis.shape[-1]
    if bits < 16:  # inverse: its first row is constant, and the first direction becomes that row
        basis = np.asarray(hadamard_transform(jnp.asarray(basis, jnp.float32), inverse=True))
    d = basis.shape[1] // size
    maps = jnp.asarray(basis.reshape(-1, 1, d, rank), jnp.float32)  # [h, 1, d, r]
    leaf: Codec = Dense() if bits == 16 else Uniform(bits)
    if settings.leaf == "lloyd_max" and bits < 16:
        leaf = Normalized(Codebook.lloyd_max(rank, bits), gain="unbiased")
    return Subspace(maps, maps, leaf, size)
