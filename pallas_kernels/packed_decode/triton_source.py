"""`packed_decode` as Triton source: what `jax_triton` compiles, without Pallas.

Read `kernel.py` first: the mathematics are the same, step by step. `triton_form` says what the
arrays are. Its `FORM` is known while compiling: loops over its tuples are unrolled, and what
differs from unit to unit or from part to part travels in tuples of tiles. This file needs triton,
so that nothing but `triton_backend` imports it.
"""

# mypy: ignore-errors
# (another language in Python's syntax, whose tuples grow)

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.packed_decode.triton_source_words import (
    added,
    channels,
    dot,
    operand,
    tokens,
    zeros,
)


@triton.jit
def packed_decode_kernel(
    a00, a01, a02, a03, a04, a05, a06, a07, a08, a09, a10, a11,
    a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
    a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35,
    a36, a37, a38, a39, a40, a41, a42, a43, a44, a45, a46, a47,
    out,
    lse,
    FORM: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and KV head; jax_triton takes no tuples of arrays."""
    arrays = (
        a00, a01, a02, a03, a04, a05, a06, a07, a08, a09, a10, a11,
        a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
        a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35,
        a36, a37, a38, a39, a40, a41, a42, a43, a44, a45, a46, a47,
    )  # fmt: skip
    b = tl.program_id(0)
    h = tl.program_id(1)
    split = tl.program_id(2)
    layer = tl.load(arrays[FORM.layer])
    length = tl.load(arrays[FORM.lengths] + b * FORM.heads + h)
    steps = tl.cdiv(length, FORM.step)
    share = tl.cdiv(steps, FORM.splits)
    first = split * share
    last = tl.minimum(first + share, steps)
    middle = first
    if FORM.unmasked:
        middle = tl.maximum(tl.minimum(length // FORM.step, last), first)

    top = tl.full((FORM.columns,), FORM.empty, tl.float32)
    total = zeros(FORM.tile, FORM)
    sums = _empty_sums(FORM)
    at = (layer, b, h, length)
    for i in range(first, middle):
        where = _where(arrays, at, i, FORM)
        for n in tl.static_range(len(FORM.passes)):
            top, total, sums = _add_units(arrays, at, where, top, total, sums, FORM, n, False)
    for i in range(middle, last):
        where = _where(arrays, at, i, FORM)
        for n in tl.static_range(len(FORM.passes)):
            top, total, sums = _add_units(arrays, at, where, top, total, sums, FORM, n, True)

    mass = tl.sum(total, 0)
    seen = tl.where(mass == 0, 1.0, mass)
    row = ((b * FORM.heads + h) * FORM.splits + split).to(tl.int64)
    column = tl.arange(0, FORM.columns)
    result = tl.where(mass == 0, FORM.empty, top + tl.log2(seen))
    tl.store(lse + row * FORM.columns + column, result)
    to = out + row * (FORM.out_rows * FORM.columns)
    for v in tl.static_range(len(FORM.values)):
        _write_sum(arrays, to, sums[v], seen, FORM, FORM.values[v])


@triton.jit
def _where(arrays, at, i, FORM: tl.constexpr):
    """Of the rows of a unit: (slot, row in the page, page of a head in memory, page in memory);
    scalars but for the row where a step is one page."""
    layer, b, h, _length = at
    row = tl.arange(0, FORM.tile)
    if FORM.used < FORM.tile:
        row = tl.minimum(row, FORM.used - 1)
    slot = i
    if FORM.together > 1:
        slot = i * FORM.together + row // FORM.rows
        row = row % FORM.rows
    room = tl.minimum(slot, FORM.slots - 1)
    if FORM.table is None:
        whole = (layer * FORM.pages + b).to(tl.int64) * FORM.slots + room
        lead = ((layer * FORM.pages + b) * FORM.heads + h).to(tl.int64) * FORM.slots + room
    else:
        page = tl.load(arrays[FORM.table] + b * FORM.slots + room)
        whole = (layer * FORM.pages + page).to(tl.int64)
        lead = whole * FORM.heads + h
    return slot, row, lead, whole


@triton.jit
def _add_units(
    arrays, at, where, top, total, sums,
    FORM: tl.constexpr, PASS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The softmax sums with some units of a step more."""
    logits = _part_logits(arrays, at, where, FORM, PASS, FORM.keys[0])
    for j in tl.static_range(1, len(FORM.keys)):
        logits = added(logits, _part_logits(arrays, at, where, FORM, PASS, FORM.keys[j]))
    if MASKED:
        shown = ()
        for k in tl.static_range(len(FORM.passes[PASS])):
            seen = _visible(arrays, at, where, FORM, FORM.passes[PASS][k])[:, None]
            shown = shown + (tl.where(seen, logits[k], FORM.empty),)
        logits = shown
    largest = logits[0]
    for k in tl.static_range(1, len(FORM.passes[PASS])):
        largest = tl.maximum(largest, logits[k])
    new_top = tl.maximum(top, tl.max(largest, 0))
    fade = tl.exp2(top - new_top)
    total = total * fade[None, :]
    p = ()
    for k in tl.static_range(len(FORM.passes[PASS])):
        weight = tl.exp2(logits[k] - new_top[None, :])
        if MASKED:  # where nothing has been seen yet, an empty logit is the largest
            seen = _visible(arrays, at, where, FORM, FORM.passes[PASS][k])[:, None]
            weight = tl.where(seen, weight, 0.0)
        p = p + (weight,)
        total += weight
    new_sums = ()
    for v in tl.static_range(len(FORM.values)):
        mine = _add_values(arrays, where, sums[v], p, fade, FORM, PASS, FORM.values[v])
        new_sums = new_sums + (mine,)
    return new_top, total, new_sums


@triton.jit
def _visible(arrays, at, where, FORM: tl.constexpr, UNIT: tl.constexpr):
    """Which tokens of a unit there are and are in reach."""
    slot, row, _lead, whole = where
    _layer, b, _h, length = at
    token = UNIT * FORM.rows + row
    seen = slot * FORM.page + token < length
    if FORM.used < FORM.tile:
        seen = seen & (tl.arange(0, FORM.tile) < FORM.used)
    if FORM.window is not None:
        start = tl.load(arrays[FORM.starts] + whole)
        now = tl.load(arrays[FORM.position] + b)
        place = start + token
        seen = seen & (start >= 0) & (place <= now) & (now - place < FORM.window)
    return seen


# Logits: S^T = K q^T.


@triton.jit
def _part_logits(
    arrays, at, where, FORM: tl.constexpr, PASS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Base-2 logits of some units, `[tile, columns]` each."""
    P: tl.constexpr = FORM.parts[PART]
    _layer, b, h, _length = at
    head = b * FORM.heads + h
    column = head * FORM.columns + tl.arange(0, FORM.columns)
    scale = tl.load(arrays[P.scale] + head)
    if P.channel_scale is None:
        const = tl.load(arrays[P.const] + column)
        queries = _queries(arrays, head, FORM, PART)
    else:
        queries, largest, const = _scaled_queries(arrays, head, where, FORM, PART)
        const = const * scale
        scale = scale * largest
    logits = _block_logits(arrays, where, queries, scale, FORM, PASS, P.blocks[0])
    for j in tl.static_range(1, len(P.blocks)):
        more = _block_logits(arrays, where, queries, scale, FORM, PASS, P.blocks[j])
        logits = added(logits, more)
    out = ()
    for k in tl.static_range(len(FORM.passes[PASS])):
        s = logits[k]
        if P.constant:
            s = s + const[None, :]
        if P.token_scale is not None:
            s = s * tokens(arrays, where, FORM, P.token_scale, FORM.passes[PASS][k])[:, None]
        if P.token_zero is not None:
            zero = tokens(arrays, where, FORM, P.token_zero, FORM.passes[PASS][k])
            s = s + zero[:, None] * tl.load(arrays[P.total] + column)[None, :]
        out = out + (s,)
    return out


@triton.jit
def _queries(arrays, head, FORM: tl.constexpr, PART: tl.constexpr):
    """Operands `[channels, columns]` of each block, each cut, each term."""
    P: tl.constexpr = FORM.parts[PART]
    queries = ()
    for j in tl.static_range(len(P.cuts)):
        for t in tl.static_range(len(FORM.blocks[FORM.cuts[P.cuts[j]].block].factors)):
            queries = queries + (_query(arrays, head, FORM, P.cuts[j], t),)
    return queries


@triton.jit
def _query(arrays, head, FORM: tl.constexpr, CUT: tl.constexpr, TERM: tl.constexpr):
    C: tl.constexpr = FORM.cuts[CUT]
    row = (head * C.operands + TERM) * C.size + tl.arange(0, C.size)
    column = tl.arange(0, FORM.columns)
    return tl.load(arrays[C.operand] + row[:, None] * FORM.columns + column[None, :])


@triton.jit
def _scaled_queries(arrays, head, where, FORM: tl.constexpr, PART: tl.constexpr):
    """The queries times the scales of a page's channels, over the largest of them; that; and what
    zero points and offsets add to each logit."""
    P: tl.constexpr = FORM.parts[PART]
    largest = tl.full((), 1e-30, tl.float32)
    for j in tl.static_range(len(P.cuts)):
        s = channels(arrays, where, FORM, P.channel_scale, P.cuts[j])
        largest = tl.maximum(largest, tl.max(tl.abs(s), 0))
    const = tl.full((FORM.columns,), 0.0, tl.float32)
    queries = ()
    for j in tl.static_range(len(P.cuts)):
        bare = _query(arrays, head, FORM, P.cuts[j], 0)
        s = channels(arrays, where, FORM, P.channel_scale, P.cuts[j])
        times = bare * (s / largest)[:, None]
        if P.channel_zero is not None:
            zero = channels(arrays, where, FORM, P.channel_zero, P.cuts[j])
            const += tl.sum(bare * zero[:, None], 0)
        if FORM.blocks[FORM.cuts[P.cuts[j]].block].offset != 0:
            offset = FORM.blocks[FORM.cuts[P.cuts[j]].block].offset * largest
            const -= tl.sum(times, 0) * offset
        for t in tl.static_range(len(FORM.blocks[FORM.cuts[P.cuts[j]].block].factors)):
            factor = FORM.blocks[FORM.cuts[P.cuts[j]].block].factors[t]
            queries = queries + ((times * factor).to(tl.float16),)
    return queries, largest, const


@triton.jit
def _block_logits(
    arrays, where, queries, scale, FORM: tl.constexpr, PASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of each unit `[tile, columns]`, computed in the order of the block's words in memory."""
    B: tl.constexpr = FORM.blocks[BLOCK]
    products = ()
    for k in tl.static_range(len(B.orders[PASS])):
        s = zeros(FORM.tile, FORM)
        for c in tl.static_range(len(B.cuts)):
            for t in tl.static_range(len(B.factors)):
                y = operand(arrays, where, FORM, B.cuts[c], B.orders[PASS][k], t, False)
                s = dot(y, queries[B.first_operand + c * len(B.factors) + t], s, FORM)
        products = products + (s,)
    out = ()
    for k in tl.static_range(len(B.orders[PASS])):
        out = out + (products[B.places[PASS][k]] * (scale * B.sizes[FORM.passes[PASS][k]]),)
    return out


# Weighted sums: O^T = V^T p^T.


@triton.jit
def _empty_sums(FORM: tl.constexpr):
    """Per part of the values: the largest scale met, constants, zero points, sums of each cut."""
    sums = ()
    for v in tl.static_range(len(FORM.values)):
        tile = zeros(FORM.tile, FORM)
        largest = tl.full((), FORM.parts[FORM.values[v]].smallest, tl.float32)
        cuts = ()
        for j in tl.static_range(len(FORM.parts[FORM.values[v]].cuts)):
            cut = zeros(FORM.cuts[FORM.parts[FORM.values[v]].cuts[j]].size, FORM)
            cuts = cuts + (cut,)
        sums = sums + ((largest, tile, tile, cuts),)
    return sums


@triton.jit
def _add_values(
    arrays, where, so_far, p, fade, FORM: tl.constexpr, PASS: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """The sums of one part with some units of a step more."""
    P: tl.constexpr = FORM.parts[PART]
    largest, const, zero, cuts = so_far
    weighted = p
    fade_out = fade
    if P.token_scale is not None:
        scales = ()
        for k in tl.static_range(len(p)):
            scale = tokens(arrays, where, FORM, P.token_scale, FORM.passes[PASS][k])
            scales = scales + (scale,)
        most = tl.abs(scales[0])
        for k in tl.static_range(1, len(p)):
            most = tl.maximum(most, tl.abs(scales[k]))
        new_largest = tl.maximum(largest, tl.max(most, 0))
        weighted = ()
        for k in tl.static_range(len(p)):
            weighted = weighted + (p[k] * (scales[k] / new_largest)[:, None],)
        fade_out = fade * (largest / new_largest)
        largest = new_largest
    if P.constant:
        const = const * fade_out[None, :]
        for k in tl.static_range(len(p)):
            const += weighted[k]
    if P.token_zero is not None:
        zero = zero * fade[None, :]
        for k in tl.static_range(len(p)):
            z = tokens(arrays, where, FORM, P.token_zero, FORM.passes[PASS][k])
            zero += p[k] * z[:, None]
    out = ()
    for j in tl.static_range(len(P.cuts)):
        acc = cuts[j] * fade_out[None, :]
        out = out + (_add_cut(arrays, where, acc, weighted, FORM, PASS, P.cuts[j]),)
    return largest, const, zero, out


@triton.jit
def _add_cut(
    arrays, where, acc, weighted, FORM: tl.constexpr, PASS: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    B: tl.constexpr = FORM.blocks[FORM.cuts[CUT].block]
    for k in tl.static_range(len(weighted)):
        for t in tl.static_range(len(B.factors)):
            y = operand(arrays, where, FORM, CUT, B.orders[PASS][k], t, True)
            weight = tl.load(arrays[B.weights] + t) * B.sizes[B.orders[PASS][k]]
            x = weighted[B.turns[PASS][k]] * weight
            if B.bits == 16:
                acc = dot(y, x.to(tl.bfloat16), acc, FORM)
            else:
                acc = dot(y, x.to(tl.float16), acc, FORM)
    return acc


@triton.jit
def _write_sum(arrays, out, sums, seen, FORM: tl.constexpr, PART: tl.constexpr):
    """Puts normalized sums where they belong."""
    P: tl.constexpr = FORM.parts[PART]
    largest, const, zero, cuts = sums
    zero_sum = tl.sum(zero, 0) / seen
    mass = tl.sum(const, 0) * largest / seen
    for j in tl.static_range(len(P.cuts)):
        _write_cut(arrays, out, cuts[j], largest / seen, mass, zero_sum, FORM, P.cuts[j])


@triton.jit
def _write_cut(arrays, out, acc, scale, mass, zero_sum, FORM: tl.constexpr, CUT: tl.constexpr):
    C: tl.constexpr = FORM.cuts[CUT]
    B: tl.constexpr = FORM.blocks[C.block]
    weights = arrays[B.weights] + len(B.factors)  # their largest, then the constant
    scale = scale * (tl.load(weights) * FORM.unscale)
    shift = tl.load(weights + 1) * mass + zero_sum
    row = C.out + tl.arange(0, C.size)
    to = out + row[:, None] * FORM.columns + tl.arange(0, FORM.columns)[None, :]
    tl.store(to, acc * scale[None, :] + shift[None, :])
