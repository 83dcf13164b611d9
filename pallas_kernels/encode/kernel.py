"""One pass over pages: a token is read once, and its codes and its scale are all that is written.

A program makes some rows of words and reads the tokens that lie in them, unit by unit: unit u of a
page is tokens `u * R .. (u + 1) * R - 1`, where R is the rows of the narrowest plane. In a wider
plane several units lie side by side, as stretches of R rows, before the next bits begin.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import planes
from pallas_kernels._call import Backend, call
from pallas_kernels.encode.config import Config, heuristic
from pallas_kernels.encode.forms import (
    GAINS,
    Dense,
    Encoded,
    Grid,
    Levels,
    Transform,
    Walsh,
    kept_dtype,
    narrow,
)
from pallas_kernels.encode.leaves import grid_codes, level_codes
from pallas_kernels.hadamard import why_not as why_not_walsh
from pallas_kernels.hadamard.product import (
    cuts,
    is_power,
    product,
    split,
    walsh_operand,
    walsh_pieces,
)

Array = jax.Array


def encode(
    x: Array,
    form: Levels | Grid,
    transform: Transform = None,
    *,
    transposed: bool = False,
    config: Config | None = None,
    backend: Backend = "triton",
) -> Encoded:
    """Words and scales of whole pages.

    Args:
      x: `[..., t, d]` bf16 or float32, pages of t tokens; d a multiple of 16.
      form: what codes there are. transform: of the channels, before.
      transposed: keep words as `[..., d, R]`.
      config: tuning; None asks `config.heuristic`.
      backend: "triton" on a GPU, "interpret" anywhere.
    Returns:
      Words `[..., R, d]` uint16 per plane width, and scales.
    Raises:
      ValueError: what `why_not` says.

    Example:
      >>> import jax.numpy as jnp
      >>> code = encode(jnp.ones((16, 32)), Grid(bits=4), backend="interpret")
      >>> [w.shape for w in code.words], code.scale.shape
      ([(4, 32)], (16, 1))
    """
    reason = why_not(x, form, transform)
    if reason:
        raise ValueError(f"encode: {reason}")
    *lead, t, d = x.shape
    pages, config = math.prod(lead), config or _config(x, form, transform)
    plan = Plan(form, transform, transposed, pages, t, d, config)
    out_shape = plan.out_shape()
    if pages:
        args = {
            "x": x.reshape(pages, t, d),
            "levels": form.levels if isinstance(form, Levels) else None,
            "operands": plan.operands(transform),
        }
        out = call(
            functools.partial(_body, plan=plan),
            args,
            name="encode",
            grid=(pl.cdiv(pages * plan.rows, plan.step),),
            out_shape=out_shape,
            backend=backend,
            warps=config.warps,
            stages=config.stages,
        )
    else:
        out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), out_shape)
    whole = lambda a: a.reshape(*lead, *a.shape[1:])
    return Encoded(*jax.tree.map(whole, (tuple(out["words"]), out["scale"], out["zero"])))


def why_not(x: Array, form: Levels | Grid, transform: Transform = None) -> str | None:
    """Why the kernel does not take these, or None."""
    t, d = x.shape[-2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"got {x.dtype}; expected bfloat16 or float32; convert first"
    if d % 16:
        return f"got {d} channels; expected a multiple of 16; use the codec"
    most = 4 if isinstance(form, Levels) else 8
    if not 1 <= form.bits <= most:
        return f"got {form.bits} bits; expected 1 to {most}; use the codec"
    if not planes.fits(t, form.bits):
        return f"got pages of {t} tokens; expected whole words; use a multiple of 16"
    if isinstance(form, Levels):
        if form.levels.shape != (2**form.bits,):
            return f"got levels {form.levels.shape}; expected ({2**form.bits},); one book for all"
        if form.gain not in GAINS:
            return f"got gain {form.gain!r}; expected one of {GAINS}; name one of them"
    elif form.group is not None and (d % form.group or form.group < 16 or not is_power(form.group)):
        return (
            f"got groups of {form.group} of {d} channels; expected a power of two, 16 or more, "
            "that divides them; use the codec"
        )
    if isinstance(transform, Walsh):
        return why_not_walsh(x, transform.signs)
    if isinstance(transform, Dense) and transform.matrix.shape != (d, d):
        return f"got a matrix {transform.matrix.shape}; expected ({d}, {d}), one for all"
    return None


def _config(x: Array, form: Levels | Grid, transform: Transform) -> Config:
    return heuristic(
        form.bits,
        x.shape[-1],
        dense=isinstance(transform, Dense),
        wide=x.dtype == jnp.float32,
        gain=isinstance(form, Levels) and form.gain != "none",
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shape of a launch: of `form` and `transform` only what is static is read in the kernel.

    Args:
      pages, page, d: of x `[pages, page, d]`.
    """

    form: Levels | Grid
    transform: Transform
    transposed: bool
    pages: int
    page: int
    d: int
    config: Config

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each array of words."""
        return planes.PLANES[self.form.bits]

    @property
    def rows(self) -> int:
        """Tokens of a unit of one page: rows of the narrowest plane."""
        return self.page * min(self.widths) // 16

    @property
    def step(self) -> int:
        """Rows of one program, a power of two, of one page or of several."""
        return min(self.config.rows, 2 ** ((self.pages * self.rows).bit_length() - 1))

    @property
    def groups(self) -> int:
        """Scales of a token."""
        group = None if isinstance(self.form, Levels) else self.form.group
        return self.d // (group or self.d)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(start, size) of the channels of one product; none lies in two groups."""
        return cuts(self.d, min(self.config.channels, self.d // self.groups))

    def out_shape(self) -> dict[str, Any]:
        """Arrays to be written."""
        turned = lambda rows: (self.d, rows) if self.transposed else (rows, self.d)
        words = [(self.pages, *turned(self.page * width // 16)) for width in self.widths]
        levels = isinstance(self.form, Levels)
        scales = (self.pages, self.page) if levels else (self.pages, self.page, self.groups)
        scale = jax.ShapeDtypeStruct(scales, kept_dtype(self.form.scale_dtype))
        return {
            "words": [jax.ShapeDtypeStruct(shape, jnp.uint16) for shape in words],
            "scale": scale,
            "zero": None if levels else scale,
        }

    def operands(self, transform: Transform) -> list[Array]:
        """bf16 summands of the matrix that rows of channels are multiplied by."""
        if isinstance(transform, Walsh):
            return [walsh_operand(self.d, self.pieces[0][1], transform.signs)]
        if isinstance(transform, Dense):
            return split(transform.matrix.astype(jnp.float32).T)
        return []


def _body(args: dict[str, Any], out: dict[str, Any], *, plan: Plan) -> None:
    at = pl.program_id(0) * plan.step + jax.lax.broadcasted_iota(jnp.int32, (plan.step,), 0)
    if plan.pages * plan.rows % plan.step:  # beyond the end, the last row once more
        at = jnp.minimum(at, plan.pages * plan.rows - 1)
    page, row = at // plan.rows, at % plan.rows
    narrowest, widest = min(plan.widths), max(plan.widths)
    together = widest // narrowest  # units whose codes have the same bits of the widest plane

    def units(i: Array, words: list[list[list[Array]]]) -> list[list[list[Array]]]:
        """Words with the next units before those they hold: the last units come first."""
        words = [[list(stretch) for stretch in plane] for plane in words]
        for s in reversed(range(together)):
            unit = (16 // widest - 1 - i) * together + s
            codes = _unit(args, out, plan, page, unit * plan.rows + row)
            low = 0
            for plane, width in zip(words, plan.widths, strict=True):
                stretch = plane[s % (width // narrowest)]
                for piece, code in enumerate(codes):
                    field = code if width == plan.form.bits else code >> low & (2**width - 1)
                    stretch[piece] = stretch[piece] * 2**width + field
                low += width
        return words

    empty = [jnp.zeros((plan.step, size), jnp.uint32) for _, size in plan.pieces]
    words = [[empty for _ in range(width // narrowest)] for width in plan.widths]
    words = jax.lax.fori_loop(0, 16 // widest, units, words)
    for ref, plane in zip(out["words"], words, strict=True):
        for s, stretch in enumerate(plane):
            for (start, size), piece in zip(plan.pieces, stretch, strict=True):
                column = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
                rows, piece = s * plan.rows + row, piece.astype(jnp.uint16)
                if plan.transposed:
                    ref[page[None, :], column[:, None], rows[None, :]] = piece.T
                else:
                    ref[page[:, None], rows[:, None], column[None, :]] = piece


def _unit(
    args: dict[str, Any], out: dict[str, Any], plan: Plan, page: Array, token: Array
) -> list[Array]:
    """Codes `[rows, size]` of each piece of the channels; their scales are written.

    Args:
      page, token: `[rows]`.
    """
    x = []
    for start, size in plan.pieces:
        column = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        x.append(args["x"][page[:, None], token[:, None], column[None, :]])
    y = _transformed(x, args["operands"], plan)
    factor = plan.d**-0.5 if isinstance(plan.transform, Walsh) else 1.0
    if isinstance(plan.form, Levels):
        codes, scale = level_codes(y, args["levels"], plan.form, factor)
        out["scale"][page, token] = narrow(scale, plan.form.scale_dtype)
        return codes
    codes, each = [], len(y) // plan.groups
    for group in range(plan.groups):
        own, scale, zero = grid_codes(y[group * each : (group + 1) * each], plan.form, factor)
        codes += own
        out["scale"][page, token, group] = narrow(scale, plan.form.scale_dtype)
        out["zero"][page, token, group] = narrow(zero, plan.form.scale_dtype)
    return codes


def _transformed(x: list[Array], operands: Any, plan: Plan) -> list[Array]:
    """Pieces of y; of `Walsh`, before it is divided by the square root of d."""
    tall = [pl.ds(start, size) for start, size in plan.pieces]
    if isinstance(plan.transform, Walsh):
        return walsh_pieces(x, [operands[0][rows, :] for rows in tall])
    if isinstance(plan.transform, Dense):
        halves = [split(a) for a in x]
        y = []
        for columns in tall:
            terms = [
                product(half, [matrix[rows, columns] for matrix in operands])
                for half, rows in zip(halves, tall, strict=True)
            ]
            y.append(sum(terms[1:], terms[0]))
        return y
    return [a.astype(jnp.float32) for a in x]
