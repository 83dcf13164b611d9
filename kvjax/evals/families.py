"""Which family a method belongs to, and how plots draw it."""

from __future__ import annotations

import re

# family: (colour, marker); the colours are told apart with any colour vision
FAMILIES = {
    "bf16": ("#222222", "p"),
    "int": ("#e69f00", "s"),
    "hadamard-int": ("#b5541c", "D"),
    "kivi": ("#009e73", "^"),
    "turboquant": ("#0072b2", "o"),
    "turboquant-prod": ("#56b4e9", "P"),
    "qjl": ("#cc79a7", "x"),
    "eden": ("#d55e00", "<"),
    "rabitq": ("#a6761d", ">"),
    "trellis": ("#c2185b", "*"),
    "e8": ("#004d40", "H"),
    "polarquant": ("#8da0cb", "8"),
    "float": ("#b8a200", "X"),
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
