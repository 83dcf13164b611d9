"""An index of vectors: packed pages, a short exact tail, and the k nearest of a query."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kvjax.codecs.serialize import shown
from kvjax.core.codec import Array, Codec
from kvjax.core.errors import InputError
from kvjax.core.pytree import pytree, static
from kvjax.search import scan
from kvjax.search.scan import METRICS, Metric, Pages, Ranked

# Squares of longer vectors could leave float32 on the way to a score.
_LONGEST2 = float(np.finfo(np.float32).max) / 16


@pytree
class Index:
    """Vectors in the order in which they came; the first is 0.

        id   0 ... P p - 1                P p ... len - 1
             P packed pages of p          exact float32 tail, less than a page

    A page is encoded once, when it is full, and never touched again; so several `add`s give what
    one gives, bit for bit. Queries stay in full precision and are scored against the packed words
    (`codec.prepare` and `logits`):

        ip:  <q, x_hat>        l2:  -(|q|^2 - 2 <q, x_hat> + |x_hat|^2)

    where `|x_hat|^2` is kept per vector as float32, and counted. An index is a frozen pytree:
    values compare with `==`, and `search` may be called inside of a jit.

    Attributes:
      codec: any codec whose arrays do not differ by KV head.
      pages: codes, and for l2 the squared lengths, by page slot.
      tail: `[r, d]` float32, r < page.
      count: how many vectors there are; slots beyond them are padding of `shard`.
      mesh, axis: where the pages lie, if `shard` has spread them.

    Example:
      >>> import jax
      >>> from kvjax.codecs import Codebook, Normalized, rotated
      >>> inner = Normalized(Codebook.lloyd_max(64, 4), gain="unbiased")
      >>> codec = rotated("hadamard", 64, inner, rng=jax.random.key(0))
      >>> x = jax.random.normal(jax.random.key(1), (1000, 64))
      >>> index = Index.create(codec, 64).add(x)
      >>> scores, ids = index.search(x[:3], k=2)
      >>> ids[:, 0]
      Array([0, 1, 2], dtype=int32)

    Source: asymmetric search on scalar codes is TurboQuant's second use (arXiv 2504.19874,
    section 4.4). Differs from the paper: one unbiased scalar per vector in place of a bit of QJL.
    """

    codec: Codec
    pages: Pages
    tail: Array
    d: int = static()
    metric: Metric = static()
    page: int = static()
    count: int = static()
    mesh: Mesh | None = static(default=None)
    axis: str | None = static(default=None)

    @staticmethod
    def create(codec: Codec, d: int, metric: Metric = "ip", page: int = 256) -> Index:
        """An empty index for vectors of dimension `d`.

        Args:
          metric: "ip", inner products, or "l2", minus the squared distance; higher is nearer.
          page: vectors that are encoded together; a multiple of 16.
        Raises:
          InputError: sizes under 1, an unknown metric, or a codec that does not take them.
        """
        if metric not in METRICS:
            raise InputError(
                "metric", got=shown(metric), expected=f"one of {METRICS}", fix="name one of them"
            )
        if any(type(size) is not int or size < 1 for size in (d, page)):
            raise InputError(
                "index",
                got=f"dimension {shown(d)}, page {shown(page)}",
                expected="whole numbers of 1 or more",
                fix="choose such sizes",
            )
        _check_codec(codec, d, page)
        pages = scan.empty_pages(codec, d, page, metric, 0)
        return Index(codec, pages, jnp.zeros((0, d), jnp.float32), d, metric, page, 0)

    def __len__(self) -> int:
        return self.count

    def add(self, vectors: Array | np.ndarray) -> Index:
        """A new index with `vectors: [n, d]` after those that are here.

        Encodes the pages that are filled by them, 8 MiB of vectors at a time. A sharded index is
        gathered and sharded again: add first, shard last.

        Raises:
          InputError: another shape, a row that is not finite or too long for float32 squares, or
            one whose scale overflows the codec's `scale_dtype`.
        """
        vectors = self._checked(vectors, "vectors")
        whole = self._gathered()
        full = (len(whole.tail) + len(vectors)) // self.page * self.page
        index = dataclasses.replace(
            whole,
            pages=_concatenate([whole.pages, *whole._encode(vectors, full)]),
            tail=jnp.asarray(whole._rows(vectors, full, None)),
            count=self.count + len(vectors),
        )
        return index if self.mesh is None else index.shard(self.mesh, str(self.axis))

    def search(self, queries: Array | np.ndarray, k: int) -> Ranked:
        """The k vectors of the highest score for each query.

        Args:
          queries: `[m, d]`. k: 1 to `len(index)`.
        Returns:
          Scores `[m, k]` float32, best first, and ids `[m, k]` int32. Equal scores are in the
          order of their ids.
        Raises:
          InputError: k out of range, or queries of another shape or with rows as `add` refuses.
        """
        if type(k) is not int or not 1 <= k <= self.count:
            raise InputError(
                "k",
                got=shown(k),
                expected=f"1 to {self.count}" if self.count else "a k of an index with vectors",
                fix="ask for fewer, or add vectors first",
            )
        q = jnp.asarray(self._checked(queries, "queries"))
        filled = jnp.int32(self.count // self.page)
        store = scan.Store(self.codec, self.pages, filled, self.tail, self.page, self.metric)
        if self.mesh is None or self.axis is None:
            return scan.search(store, q, k)
        return scan.search_sharded(store, q, k, self.mesh, self.axis)

    def shard(self, mesh: Mesh, axis: str) -> Index:
        """The same index with its pages spread over a mesh axis; results are equal to rounding.

        The number of page slots is padded to a multiple of the axis; padding is never a result,
        and is counted in `bytes`. Codec and tail are on every device.
        """
        if axis not in mesh.shape:
            raise InputError(
                "axis",
                got=repr(axis),
                expected=f"one of {tuple(mesh.shape)}",
                fix="name an axis of the mesh",
            )
        whole = self._gathered()
        padding = -(self.count // self.page) % mesh.shape[axis]
        spare = scan.empty_pages(self.codec, self.d, self.page, self.metric, padding)
        split, everywhere = (NamedSharding(mesh, PartitionSpec(*names)) for names in ([axis], []))
        return dataclasses.replace(
            whole,
            codec=jax.device_put(whole.codec, everywhere),
            pages=jax.device_put(_concatenate([whole.pages, spare]), split),
            tail=jax.device_put(whole.tail, everywhere),
            mesh=mesh,
            axis=axis,
        )

    def decode(self) -> Array:
        """All vectors as the index knows them, `[len, d]` float32."""
        whole = self._gathered()
        packed = scan.decode(whole.codec, whole.pages.code)  # [n, p, d]
        return jnp.concatenate([packed.reshape(-1, self.d), whole.tail])

    @property
    def bytes(self) -> int:
        """Bytes of codes, norms, padding and tail, from their shapes. The codec (a rotation, a
        codebook) is one for all vectors, and not counted."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((self.pages, self.tail)))

    @property
    def bits_per_value(self) -> float:
        """Bits of `bytes` for each of the `len * d` numbers; NaN for an empty index."""
        return self.bytes * 8 / (self.count * self.d) if self.count else float("nan")

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all; a sharded index is saved as one.

        Raises:
          InputError: a place that cannot be written.
        """
        from kvjax.search.file import write

        write(self._gathered(), path)

    @staticmethod
    def load(path: str | os.PathLike) -> Index:
        """The index that `save` wrote, equal to it.

        Raises:
          InputError: no such file, one cut short, of another format or version, or whose parts do
            not fit together.
        """
        from kvjax.search.file import read

        return read(path)

    def _rows(self, vectors: Array | np.ndarray, start: int, stop: int | None) -> Array:
        """Rows of the tail and the vectors behind it, without a copy of all of them."""
        xp, r = _module(vectors), len(self.tail)
        after = vectors[max(start - r, 0) : None if stop is None else max(stop - r, 0)]
        return xp.concatenate([xp.asarray(self.tail[start:stop]), after])

    def _encode(self, vectors: Array | np.ndarray, full: int) -> list[Pages]:
        """The codes of the first `full` rows, in pieces."""
        step, pieces = scan.pages_at_once(self.d, self.page) * self.page, []
        for start in range(0, full, step):
            x = self._rows(vectors, start, min(start + step, full))
            n = len(x) // self.page
            x = _module(x).pad(x, ((0, step - len(x)), (0, 0)))
            paged = x.reshape(-1, self.page, self.d)
            pages, finite = scan.encode(self.codec, paged, jnp.int32(n), self.metric)
            if not isinstance(finite, jax.core.Tracer) and not (ok := np.asarray(finite)).all():
                first = len(self) // self.page * self.page + start + int(ok.argmin()) * self.page
                raise InputError(
                    f"vectors {first} to {first + self.page - 1}",
                    got="a code that is not finite",
                    expected="lengths that the codec's scale_dtype can hold",
                    fix='use scale_dtype "float32", or scale the vectors down',
                )
            pieces.append(
                pages if n * self.page == step else jax.tree.map(lambda a, n=n: a[:n], pages)
            )
        return pieces

    def _gathered(self) -> Index:
        """Without padding, on one device."""
        if self.mesh is None:
            return self
        full, device = self.count // self.page, SingleDeviceSharding(self.mesh.devices.flat[0])
        pages = jax.tree.map(lambda a: a[:full], jax.device_put(self.pages, device))
        codec, tail = jax.device_put((self.codec, self.tail), device)
        return dataclasses.replace(self, codec=codec, pages=pages, tail=tail, mesh=None, axis=None)

    def _checked(self, x: Array | np.ndarray, what: str) -> Array | np.ndarray:
        """`[n, d]` float32, checked row by row outside of a jit."""
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.d or not _is_real(x.dtype):
            raise InputError(
                what,
                got=f"{x.dtype}{list(x.shape)}",
                expected=f"numbers of shape [n, {self.d}]",
                fix="give one row per vector",
            )
        x = x.astype(np.float32, copy=False)
        if isinstance(x, jax.core.Tracer):
            return x
        with np.errstate(over="ignore", invalid="ignore"):
            ok = np.asarray(_module(x).einsum("nd,nd->n", x, x) < _LONGEST2)  # False for NaN
        if not ok.all():
            row = int(ok.argmin())
            bad = "NaN or infinite" if not np.isfinite(np.asarray(x[row])).all() else "too long"
            raise InputError(
                f"{what}, row {row}",
                got=f"{bad} ({int((~ok).sum())} such rows)",
                expected="finite numbers whose squares float32 can add up",
                fix="clean or scale the data before it is searched",
            )
        return x


def _check_codec(codec: Codec, d: int, page: int) -> None:
    """Raises `InputError` unless a codec takes such pages without any leading axes."""
    codec.check(d, page)

    def logits(x, q):
        return codec.logits(codec.prepare(q), codec.encode(x))

    spec = lambda t: jax.ShapeDtypeStruct((t, d), jnp.float32)
    shape = jax.eval_shape(logits, spec(page), spec(3)).shape
    if shape != (3, page):
        raise InputError(
            "codec",
            got=f"scores of shape {list(shape)} for 3 queries and a page of {page}",
            expected=f"[3, {page}]",
            fix="use a codec without an array per KV head",
        )


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def _module(x: Array | np.ndarray) -> Any:
    """numpy or jax.numpy: vectors stay where they are until they are encoded."""
    return jnp if isinstance(x, jax.Array) else np


def _concatenate(parts: list[Pages]) -> Pages:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
