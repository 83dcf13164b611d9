"""What a user did wrong, in one line of three parts: got, expected, what to do."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in the input, told so that it can be mended without reading the source.

    The command line prints it as one line and exits with status 2; library callers get an
    ordinary `ValueError`.

    Args:
      what: the thing that was looked at ("method", "--context", "layer 7").
      got: what was found there.
      expected: what would have been right.
      fix: what to do about it.

    Example:
      >>> raise InputError("bits", got=9, expected="1 to 8", fix="choose a width in that range")
      Traceback (most recent call last):
      ...
      kvjax.core.errors.InputError: bits: got 9; expected 1 to 8; choose a width in that range
    """

    def __init__(self, what: str, *, got: object, expected: object, fix: str):
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        super().__init__(f"{what}: got {got}; expected {expected}; {fix}")


def known(names) -> str:
    """`names` as one readable list, for errors about a name that is not among them."""
    return "one of " + ", ".join(str(n) for n in names)
