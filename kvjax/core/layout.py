"""Where the tokens of a cache live: an exact sink, an exact recent window, and packed pages."""

from __future__ import annotations

import dataclasses

from kvjax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static shape of the cache of one sequence.

        position   0 ... sink-1    sink ... boundary-1      boundary ... length-1
        kept as    exact, always   packed pages of `page`   exact, in the recent ring

    The last `recent` tokens are always exact. A page leaves the ring, and is encoded once, when
    its youngest token is more than `recent` old; so the exact stretch holds `recent` to
    `recent + page - 1` tokens, and the ring has `recent + page` slots.

    Args:
      sink: exact tokens at the start.
      recent: tokens at the end that are never packed; a multiple of `page`.
      page: tokens encoded together.
      pool: None for contiguous pages per sequence, or the number of pages in a pool that all
        sequences share through a page table.
      encode_batch: sequences of a batch whose pages are encoded together. In a ragged batch they
        fill their pages at different steps, and 1 encodes just the pages that are due; a batch of
        equal lengths fills them all at once, and encodes them in one go with the batch size here.

    Example:
      >>> Layout(sink=4, recent=64, page=32).packed_pages(100)
      1
    """

    sink: int = 4
    recent: int = 64
    page: int = 64
    pool: int | None = None
    encode_batch: int = 1

    def __post_init__(self):
        if min(self.sink, self.recent) < 0 or min(self.page, self.encode_batch) < 1:
            raise InputError(
                "layout",
                got=f"sink {self.sink}, recent {self.recent}, page {self.page}, "
                f"encode_batch {self.encode_batch}",
                expected="sink and recent of 0 or more, page and encode_batch of 1 or more",
                fix="choose such sizes",
            )
        if self.pool is not None and self.pool < 1:
            raise InputError(
                "pool", got=self.pool, expected="1 or more pages, or None", fix="None is contiguous"
            )
        if self.recent % self.page:
            raise InputError(
                "recent",
                got=f"{self.recent} with pages of {self.page}",
                expected="a multiple of the page",
                fix=f"use {-(-self.recent // self.page) * self.page}, or another page",
            )

    def packed_pages(self, length):
        """How many pages a sequence of `length` tokens has packed (ints or arrays)."""
        whole = (length - self.sink - self.recent) // self.page
        return whole * (whole > 0)

    @property
    def ring(self) -> int:
        """Slots of the recent ring."""
        return self.recent + self.page

    def page_slots(self, capacity: int, window: int | None = None) -> int:
        """Page slots per sequence for `capacity` tokens.

        With a sliding `window` only the pages that some query of a block of up to one page can
        still reach are kept, and their slots are used in turn.
        """
        slots = max(1, int(self.packed_pages(capacity)))
        if window is not None:
            slots = min(slots, max(1, -(-(window - self.recent) // self.page) + 2))
        return slots
