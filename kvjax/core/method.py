"""A method: one codec for keys, one for values, and the layout that they are kept in."""

from __future__ import annotations

import dataclasses

from kvjax.core.codec import Codec
from kvjax.core.layout import Layout
from kvjax.core.pytree import pytree, static


@pytree
class Method:
    """How a cache compresses; a value that can be printed, compared, stacked and replaced.

    Keys and values are set independently: `Method(key=kivi(2).key, value=integer(4).value)`.

    Args:
      key, value: codecs for `[..., t, head_dim]` pages.
      layout: windows and page size.
      name: what tables call it.
    """

    key: Codec
    value: Codec
    layout: Layout = static(default=Layout())
    name: str = static(default="custom")

    def with_layout(self, layout: Layout) -> Method:
        """The same codecs in another layout."""
        return dataclasses.replace(self, layout=layout)

    def transpose_values(self) -> Method:
        """The same method with the words of values kept `[d, R]`, for kernels on a GPU; a CPU
        unpacks rows two to ten times faster, and is the default."""
        return dataclasses.replace(self, value=self.value.transpose_planes())

    def check(self, head_dim: int) -> None:
        """Raises `InputError` when vectors of `head_dim` or this page size do not fit."""
        self.key.check(head_dim, self.layout.page)
        self.value.check(head_dim, self.layout.page)
