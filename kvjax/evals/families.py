"""Which family a method belongs to, and how plots draw it."""

from __future__ import annotations

import re
from typing import Literal

Marker = (
    str | tuple[int, Literal[0, 1, 2], int]
)  # of matplotlib: a letter, or corners, style and angle

# family: (colour, marker); the colours are told apart with any colour vision, but for the ladder
# from `centred` to `klt`, which is one colour that deepens
FAMILIES: dict[str, tuple[str, Marker]] = {
    "bf16": ("#222222", "p"),
    "int": ("#e69f00", "s"),
    "hadamard-int": ("#b5541c", "D"),
    "kivi": ("#009e73", "^"),
    "turboquant": ("#0072b2", "o"),
    "turboquant-prod": ("#56b4e9", "P"),
    "qjl": ("#cc79a7", (8, 1, 0)),
    "eden": ("#d55e00", "<"),
    "rabitq": ("#a6761d", ">"),
    "trellis": ("#c2185b", "*"),
    "e8": ("#004d40", "H"),
    "polarquant": ("#8da0cb", "8"),
    "float": ("#b8a200", "X"),
    "oscar": ("#5b3fd6", (6, 1, 0)),
    "centred": ("#f28e8e", (3, 1, 0)),
    "balanced": ("#e8505b", (4, 1, 45)),
    "klt": ("#d1001f", (4, 1, 0)),
    "mixed": ("#7a52a8", "h"),
    "other": ("#8a8a8a", "d"),
}


def family(method: str) -> str:
    """The key of `FAMILIES` that a method's name belongs to.

    Example:
      >>> family("turboquant-prod-3"), family("kivi-2/turboquant-3"), family("mine")
      ('turboquant-prod', 'mixed', 'other')
    """
    if "/" in method:
        return "mixed"
    if re.match(r"(nv|mx)?fp\d", method):
        return "float"
    names = "|".join(sorted(FAMILIES, key=len, reverse=True))
    found = re.match(rf"({names})(?![a-z])", method)
    return found[1] if found else "other"
