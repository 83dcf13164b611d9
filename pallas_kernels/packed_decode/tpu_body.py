"""The body of the TPU kernel: the pages of one step of one sequence and head.

Tokens lie along lanes in the logits, along sublanes in the operands. Queries and weights of tokens
go into the products as two bf16 halves, one above the other: the cache is what a matrix unit has to
be loaded with, so that more rows cost little. Scales of tokens multiply logits and weights, scales
of channels the query, once per page.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.packed_decode.tpu_form import (
    ROWS,
    Floats,
    Form,
    fields,
    numbers,
    operands,
    split,
)

Array = jax.Array

EMPTY = -1e30  # a logit of nothing: finite, so that differences are 0 and not NaN


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static shape of a launch.

    Attributes:
      page: tokens of a page. slots: page slots of a sequence.
      together: pages of one step.
      pool: whether pages lie in a pool, `[layer, page, h]`, or in rows, `[layer, b, h, page]`.
      window: tokens that a query sees back from itself, or None.
    """

    key: Form
    value: Form
    page: int
    slots: int
    together: int
    pool: bool
    window: int | None

    def step(self, i: Array, length: Array) -> Array:
        """Step i; beyond the sequence its last one, whose pages are there."""
        tokens = self.together * self.page
        return jnp.minimum(i, jnp.maximum((length + tokens - 1) // tokens - 1, 0))

    def slot(self, i: Array, j: int, length: Array) -> Array:
        """The slot of page j of step i; in a pool, beyond the sequence its last one."""
        slot = self.step(i, length) * self.together + j
        if not self.pool:
            return slot
        return jnp.minimum(slot, jnp.maximum((length + self.page - 1) // self.page - 1, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What is kept from step to step, and at its end becomes the output.

    Attributes:
      out: per piece `[n, columns]`, sums of values. top: `[n, 1]`, the largest logit. total: `[n,
        1]`, the sum of weights.
    """

    out: list[Any]
    top: Any
    total: Any


def attend(numbers: dict[str, Any], args: dict[str, Any], out, state: State, *, plan: Plan) -> None:
    """One step: its pages into the state, and at the last step the state into the output."""
    b, h, i = (pl.program_id(axis) for axis in range(3))
    length = numbers["lengths"][b, h]

    @pl.when(i == 0)
    def _start():
        for ref in (*state.out, state.total):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        state.top[...] = jnp.full(state.top.shape, EMPTY)

    @pl.when(i * plan.together * plan.page < length)
    def _step():
        pages = [Page(plan, numbers, args, b, h, i, j) for j in range(plan.together)]
        seen = [page.seen(length) for page in pages]
        logits = [jnp.where(v, p.logits(), EMPTY) for p, v in zip(pages, seen, strict=True)]
        most = functools.reduce(jnp.maximum, [s.max(1, keepdims=True) for s in logits])
        top = jnp.maximum(state.top[...], most)
        fade = jnp.exp2(state.top[...] - top)
        p = [jnp.where(v, jnp.exp2(s - top), 0.0) for s, v in zip(logits, seen, strict=True)]
        total = sum(x.sum(1, keepdims=True) for x in p)
        sums = [page.values(x) for page, x in zip(pages, p, strict=True)]
        for ref, *each in zip(state.out, *sums, strict=True):
            ref[...] = ref[...] * fade + functools.reduce(operator.add, each)
        state.total[...] = state.total[...] * fade + total
        state.top[...] = top

    @pl.when(i == pl.num_programs(2) - 1)
    def _end():
        outs, lse = out
        total = state.total[...]
        some = jnp.where(total == 0, 1.0, total)
        for ref, sums in zip(outs, state.out, strict=True):
            ref[...] = sums[...] / some
        lse[...] = jnp.where(total == 0, EMPTY, state.top[...] + jnp.log2(some))


@dataclasses.dataclass(frozen=True)
class Page:
    """Page j of step i, for one sequence and head."""

    plan: Plan
    scalars: dict[str, Any]
    args: dict[str, Any]
    b: Array
    h: Array
    i: Array
    j: int

    @property
    def at(self) -> Array:
        """Where the page lies: in its row, or in the pool."""
        slot = self.plan.slot(self.i, self.j, self.scalars["lengths"][self.b, self.h])
        return self.scalars["table"][self.b, slot] if self.plan.pool else slot

    def seen(self, length: Array) -> Array:
        """Which tokens there are and are in reach, `[1, t]` bool."""
        plan = self.plan
        token = jax.lax.broadcasted_iota(jnp.int32, (1, plan.page), 1)
        seen = (self.i * plan.together + self.j) * plan.page + token < length
        if plan.window is None:
            return seen
        starts, now = self.scalars["starts"], self.scalars["position"][self.b]
        start = starts[self.at] if plan.pool else starts[self.b, self.at]
        at = start + token
        return seen & (start >= 0) & (at <= now) & (now - at < plan.window)

    def logits(self) -> Array:
        """Base-2 logits `[n, t]`."""
        form = self.plan.key
        bare = [ref[...] for ref in self.args["queries"]]
        scaled = []
        for k, (piece, q) in enumerate(zip(form.pieces, bare, strict=True)):
            scale = self.channels(form.parts[piece.part].channel_scale, form, k)
            scaled.append(q if scale is None else q * scale)
        sums = self.products(form, scaled, over=1)
        out: Any = 0.0
        for p, part in enumerate(form.parts):
            mine = [k for k, piece in enumerate(form.pieces) if piece.part == p]
            own = functools.reduce(
                operator.add, [sums[k] + self.constant(form, k, scaled[k]) for k in mine]
            )
            if part.token_scale is not None:
                own = own * self.numbers(part.token_scale)
            if part.token_zero is not None:
                total = sum(bare[k].sum(1, keepdims=True) for k in mine)
                own = own + total * self.numbers(part.token_zero)
            for k in mine:
                zero = self.channels(part.channel_zero, form, k)
                if zero is not None:
                    own = own + (bare[k] * zero).sum(1, keepdims=True)
            out = out + own
        return out

    def values(self, p: Array) -> list[Array]:
        """Per piece `[n, columns]`, sums of values weighted by `p`, `[n, t]`."""
        form = self.plan.value
        weighted: list[Array] = []
        zeros: list[Any] = []
        for part in form.parts:
            scale, zero = part.token_scale, part.token_zero
            weighted.append(p if scale is None else p * self.numbers(scale))
            zeros.append(0.0 if zero is None else (p * self.numbers(zero)).sum(1, keepdims=True))
        lefts = [weighted[piece.part] for piece in form.pieces]
        sums = self.products(form, lefts, over=0)
        return [
            x + (self.constant(form, k, lefts[k]) + zeros[form.pieces[k].part])
            for k, x in enumerate(sums)
        ]

    def products(self, form: Form, lefts: list[Array], *, over: int) -> list[Array]:
        """Per piece its left side times its codes, but for the constant that they leave out.

        Args:
          over: the axis of codes `[t, columns]` that is summed over.
        """
        out: dict[int, Array] = {}
        for c, codes in enumerate(form.codes):
            mine = [k for k, piece in enumerate(form.pieces) if piece.codes == c]
            n = lefts[mine[0]].shape[0]
            left = jnp.concatenate([split(lefts[k]) for k in mine], 0)
            for t, operand in enumerate(operands(codes, self.tile)):
                both = jax.lax.dot_general(
                    left,
                    operand,
                    (((1,), (over,)), ((), ())),
                    precision=jax.lax.Precision.DEFAULT,
                    preferred_element_type=jnp.float32,
                )
                for m, k in enumerate(mine):
                    x = both[2 * m * n : (2 * m + 1) * n] + both[(2 * m + 1) * n : (2 * m + 2) * n]
                    if codes.bits < 16:
                        x = x * self.args["weights"][form.pieces[k].weights + t]
                    out[k] = x if k not in out else out[k] + x
        return [out[k] for k in range(len(form.pieces))]

    def constant(self, form: Form, k: int, left: Array) -> Array | float:
        """What the operands of piece k leave out of values, times a left side's sum: `[n, 1]`."""
        piece = form.pieces[k]
        codes = form.codes[piece.codes]
        if codes.bits == 16:
            return 0.0
        count = len(fields(codes.bits, codes.levels))
        return left.sum(1, keepdims=True) * self.args["weights"][piece.weights + count]

    def numbers(self, floats: Floats) -> Array:
        """One float32 per token or channel, `[1, size]`."""
        row = (self.h if self.plan.pool else self.at) % ROWS
        several = floats.column is None
        return numbers(floats, self.tile(floats.array, several=several)[...], row)

    def channels(self, floats: Floats | None, form: Form, k: int) -> Array | None:
        """A number per channel of piece k, where its codes have them: `[1, columns]`."""
        if floats is None:
            return None
        piece = form.pieces[k]
        first = sum(p.size for p in form.pieces[:k] if p.part == piece.part)
        mine = self.numbers(floats)[:, first : first + piece.size]
        fill = [jnp.zeros((1, n), jnp.float32) for n in piece.around]
        return jnp.concatenate([x for x in (fill[0], mine, fill[1]) if x.shape[1]], 1)

    def tile(self, array: int, *, several: bool = False) -> Any:
        """Reference to the page's tile of an array, or to the rows of several pages or heads."""
        copy, at = (self.j, 0) if self.plan.pool else (0, self.j)
        ref = self.args["pages"][copy][array]
        return ref if several else ref.at[at]
