"""A method: one codec for keys, one for values, and the layout that they are kept in."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from kvjax.core.codec import Codec
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.pytree import pytree, static

Attention = Literal["auto", "page_scan", "triton", "jax_triton", "tpu", "interpret"]


@pytree
class Method:
    """How a cache compresses; a value that can be printed, compared, stacked and replaced.

    Keys and values are set independently: `Method(key=kivi(2).key, value=integer(4).value)`.

    Args:
      key, value: codecs for `[..., t, head_dim]` pages.
      layout: windows and page size.
      name: what tables call it.
      attention: what reads the codes in a decode step: "auto" is a kernel on a GPU, where there is
        one for these codecs, and the page scan of XLA elsewhere; "page_scan", "triton",
        "jax_triton" (the kernel as Triton source, without Pallas; needs the extra `triton`), "tpu"
        and "interpret" (the kernel on any device, slowly, for tests) insist.
    """

    key: Codec
    value: Codec
    layout: Layout = static(default=Layout())
    name: str = static(default="custom")
    attention: Attention = static(default="auto")

    def __post_init__(self):
        if self.attention not in get_args(Attention):
            raise InputError(
                "attention",
                got=repr(self.attention),
                expected=known(get_args(Attention)),
                fix="name one of them",
            )

    def with_layout(self, layout: Layout) -> Method:
        """The same codecs in another layout."""
        return dataclasses.replace(self, layout=layout)

    def with_attention(self, attention: Attention) -> Method:
        """The same method, its codes read by that."""
        return dataclasses.replace(self, attention=attention)

    def transpose_values(self) -> Method:
        """The same method with the words of values kept `[d, R]`, for kernels on a GPU; a CPU
        unpacks rows two to ten times faster, and is the default."""
        return dataclasses.replace(self, value=self.value.transpose_planes())

    def check(self, head_dim: int) -> None:
        """Raises `InputError` when vectors of `head_dim` or this page size do not fit."""
        self.key.check(head_dim, self.layout.page)
        self.value.check(head_dim, self.layout.page)
