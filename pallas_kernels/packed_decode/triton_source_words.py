"""What `triton_source` loads, and what becomes of words: operands of products.

As `bits.py` and `asm.py`, with the tables of `triton_form` in place of their code.
"""

# mypy: ignore-errors
# (another language in Python's syntax, whose tuples grow)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(
    arrays, where, FORM: tl.constexpr,
    CUT: tl.constexpr, UNIT: tl.constexpr, TERM: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """fp16 (of 16 bits: bf16) left operand of one term of a unit, `[tile, channels]`, or turned."""
    B: tl.constexpr = FORM.blocks[FORM.cuts[CUT].block]
    R: tl.constexpr = B.recipes[UNIT][TERM]
    words = _words(arrays, where, FORM, CUT, R.planes[0], R.stretches[0], TURNED)
    words = _shifted(words, R.rights[0], FORM.native)
    for k in tl.static_range(1, len(R.planes)):
        more = _words(arrays, where, FORM, CUT, R.planes[k], R.stretches[k], TURNED)
        words = _xor(words, _shifted(more, R.rights[k], FORM.native), FORM.native)
    if B.bits == 16:
        out = words.to(tl.bfloat16, bitcast=True)
    else:
        out = _as_subnormal(words, R.mask, FORM.native)
    return out


@triton.jit
def _words(
    arrays, where, FORM: tl.constexpr,
    CUT: tl.constexpr, PLANE: tl.constexpr, STRETCH: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = FORM.cuts[CUT]
    W: tl.constexpr = FORM.blocks[C.block].words[PLANE]
    _slot, row, lead, _whole = where
    channel = tl.arange(0, C.size)
    if C.used < C.size:  # the last again: it meets zeros, or its sums are not used
        channel = tl.minimum(channel, C.used - 1)
    channel = (channel + C.start) * W.channel
    # In this order the rows of all stretches are one pointer, and numbers in the instructions.
    rows = arrays[W.array] + lead * W.page + row * W.row + STRETCH * FORM.rows * W.row
    if TURNED:
        words = tl.load(rows[None, :] + channel[:, None])
    else:
        words = tl.load(rows[:, None] + channel[None, :])
    return words


@triton.jit
def tokens(arrays, where, FORM: tl.constexpr, SCALES: tl.constexpr, UNIT: tl.constexpr):
    """One float32 per token of a unit, `[tile]`."""
    S: tl.constexpr = FORM.scales[SCALES]
    _slot, row, lead, _whole = where
    rows = arrays[S.array] + lead * (FORM.page * S.columns) + row * S.columns
    return _widen(tl.load(rows + (UNIT * FORM.rows * S.columns + S.column)), S.is_bits)


@triton.jit
def channels(arrays, where, FORM: tl.constexpr, SCALES: tl.constexpr, CUT: tl.constexpr):
    """One float32 per channel of a cut."""
    S: tl.constexpr = FORM.scales[SCALES]
    C: tl.constexpr = FORM.cuts[CUT]
    _slot, _row, lead, _whole = where
    channel = tl.arange(0, C.size)
    if C.used < C.size:
        channel = tl.minimum(channel, C.used - 1)
    return _widen(tl.load(arrays[S.array] + lead * S.columns + C.in_part + channel), S.is_bits)


# What is done to words: assembly on a GPU, where words lie two in a register; else its twin.


@triton.jit
def _widen(kept, IS_BITS: tl.constexpr):
    """float32 of a kept float, or of the bits of a bf16."""
    if IS_BITS:
        wide = (kept.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = kept.to(tl.float32)
    return wide


@triton.jit
def _shifted(words, RIGHT: tl.constexpr, NATIVE: tl.constexpr):
    if RIGHT == 0:
        out = words
    elif NATIVE:
        if RIGHT > 0:
            out = tl.inline_asm_elementwise(
                f"shr.b32 $0, $1, {RIGHT};", "=r,r", [words], tl.uint16, is_pure=True, pack=2
            )
        else:
            out = tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {-RIGHT};", "=r,r", [words], tl.uint16, is_pure=True, pack=2
            )
    elif RIGHT > 0:
        out = (words >> RIGHT).to(tl.uint16)
    else:
        out = (words << -RIGHT).to(tl.uint16)
    return out


@triton.jit
def _xor(a, b, NATIVE: tl.constexpr):
    if NATIVE:
        out = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r", [a, b], tl.uint16, is_pure=True, pack=2
        )
    else:
        out = a ^ b
    return out


@triton.jit
def _as_subnormal(words, MASK: tl.constexpr, NATIVE: tl.constexpr):
    """`words & MASK` read as float16: an integer k below 1024 is the number `k * 2**-24`."""
    if NATIVE:
        out = tl.inline_asm_elementwise(
            f"and.b32 $0, $1, {MASK * 65537};", "=r,r", [words], tl.float16, is_pure=True, pack=2
        )
    else:
        out = (words & MASK).to(tl.uint16).to(tl.float16, bitcast=True)
    return out


@triton.jit
def dot(a, b, acc, FORM: tl.constexpr):
    if not FORM.native:  # the interpreter multiplies bf16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def zeros(ROWS: tl.constexpr, FORM: tl.constexpr):
    return tl.full((ROWS, FORM.columns), 0.0, tl.float32)


@triton.jit
def added(a, b):
    out = ()
    for k in tl.static_range(len(a)):
        out = out + (a[k] + b[k],)
    return out
