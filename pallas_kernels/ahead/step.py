"""How much of the cache one iteration of a kernel's loop reads: counted in the program itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from pallas_kernels.ahead.lowering import lowering_for
from pallas_kernels.packed import Packed, terms
from pallas_kernels.packed_decode.operands import chunks


def operand_elements(f: Callable, args: Any, name: str) -> int:
    """Elements of the left operands of all matrix products in the first loop of a Pallas kernel,
    which is the one without masks."""
    with lowering_for("cuda"):
        whole = jax.make_jaxpr(f)(args).jaxpr
    [kernel] = [e for e in _equations(whole) if e.primitive.name == "pallas_call" and _is(e, name)]
    loops = (e for e in _equations(kernel.params["jaxpr"]) if e.primitive.name in ("while", "scan"))
    first = next(loops, None)
    if first is None:
        return 0
    body = first.params["jaxpr" if first.primitive.name == "scan" else "body_jaxpr"].jaxpr
    products = [e for e in _equations(body) if e.primitive.name == "dot_general"]
    return sum(e.invars[0].aval.size for e in products)


def elements_of_token(key: Packed, value: Packed, channels: int = 256) -> int:
    """The same for one token of one head in `packed_decode`: each channel once per term."""
    total = 0
    for block in (block for part in (*key, *value) for block in part.blocks):
        count = 1 if block.bits == 16 else len(terms(block.bits, block.levels is not None))
        total += count * sum(chunk.size for chunk in chunks(block, channels))
    return total


def _is(equation: Any, name: str) -> bool:
    info = equation.params.get("name_and_src_info", equation.params.get("name"))
    return str(getattr(info, "name", info)).startswith(name)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from _equations(getattr(inner, "jaxpr", inner))
