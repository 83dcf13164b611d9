"""Which layer's keys and values every layer reads: sharing across layers, as a static map.

`layer_map[l]` is the owner of layer l: l itself where it computes keys and values of its own, an
earlier layer where it borrows. See `pairs` (CLA) and `last_shared` (Gemma 3n and 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvjax.core.errors import InputError

LayerMap = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Lending:
    """How the layers of a run share.

    Attributes:
      owns: per layer, whether it has keys and values of its own.
      slots: per layer, where its owner's keys and values of the present tokens are held, of as few
        slots as there are owners in use at a time.
    """

    owns: tuple[bool, ...]
    slots: tuple[int, ...]

    @property
    def alike(self) -> bool:
        """Whether all layers own, or all borrow."""
        return len(set(self.owns)) == 1


def pairs(layers: int, start: int = 0, stop: int | None = None) -> LayerMap:
    """Every second layer of `start .. stop - 1` borrows from the one before (CLA with factor 2).

    Source: Cross-Layer Attention, arXiv 2405.12981.

    Raises:
      InputError: a range that the model does not have.

    Example:
      >>> pairs(5)
      (0, 0, 2, 2, 4)
      >>> pairs(6, start=2)
      (0, 1, 2, 2, 4, 4)
    """
    stop = layers if stop is None else stop
    if not 0 <= start <= stop <= layers:
        raise InputError(
            "pairs",
            got=f"layers {start} to {stop} of {layers}",
            expected="0 <= start <= stop <= layers",
            fix="choose layers that the model has",
        )
    borrows = lambda n: start <= n < stop and (n - start) % 2 == 1
    return tuple(n - 1 if borrows(n) else n for n in range(layers))


def last_shared(windows: Sequence[int | None], shared: int) -> LayerMap:
    """The last `shared` layers borrow from the last other layer with the same window.

    That is `num_kv_shared_layers` of Gemma 3n and 4, as in their config.json.

    Args:
      windows: of every layer, None for full attention.
    Raises:
      InputError: more layers than there are, or none before them with their window.

    Example:
      >>> last_shared((512, 512, None, 512, None), 2)
      (0, 1, 2, 1, 2)
    """
    layers = len(windows)
    if not 0 <= shared < max(layers, 1):
        raise InputError(
            "shared layers",
            got=f"{shared} of {layers}",
            expected="0 or more, and one that owns its keys and values",
            fix="share fewer layers",
        )
    own = windows[: layers - shared]
    last = {window: n for n, window in enumerate(own)}
    for n in range(len(own), layers):
        if windows[n] not in last:
            raise InputError(
                f"layer {n}",
                got=f"{_kind(windows[n])}, which no layer before layer {len(own)} has",
                expected="an earlier layer of its kind to borrow from",
                fix="share fewer layers",
            )
    return (*range(len(own)), *(last[window] for window in windows[len(own) :]))


def check_layer_map(layer_map: LayerMap, windows: Sequence[int | None], name: str) -> None:
    """Raises `InputError` unless every layer owns, or borrows from an earlier owner of its kind."""
    what = f"layer_map of {name}"
    if len(layer_map) != len(windows):
        raise InputError(
            what,
            got=f"{len(layer_map)} entries",
            expected=f"one for each of the {len(windows)} layers",
            fix="give every layer its owner, itself where it borrows from none",
        )
    for layer, owner in enumerate(layer_map):
        if not 0 <= owner <= layer:
            raise InputError(
                what,
                got=f"layer {layer} that borrows from layer {owner}",
                expected="itself or an earlier layer",
                fix="turn the two around",
            )
        if layer_map[owner] != owner:
            raise InputError(
                what,
                got=f"layer {layer} that borrows from layer {owner}, itself a borrower",
                expected="an owner",
                fix=f"let layer {layer} borrow from layer {layer_map[owner]}",
            )
        if windows[layer] != windows[owner]:
            raise InputError(
                what,
                got=f"layer {layer} ({_kind(windows[layer])}) that borrows from layer {owner} "
                f"({_kind(windows[owner])})",
                expected="layers with one window, and so one rotation",
                fix="let it borrow from a layer of its kind",
            )


def lending(layer_map: LayerMap, start: int, stop: int) -> Lending | None:
    """How layers `start .. stop - 1` share; None where they neither borrow nor lend.

    Example:
      >>> lending((0, 0, 2, 2), 0, 4)
      Lending(owns=(True, False, True, False), slots=(0, 0, 0, 0))
      >>> lending((0, 1, 0, 1), 0, 2).slots
      (0, 1)
    """
    layers = range(start, stop)
    borrowed = {owner for layer, owner in enumerate(layer_map) if owner != layer}
    if not any(layer in borrowed or layer_map[layer] != layer for layer in layers):
        return None
    slots = _slots(layer_map)
    owns = tuple(layer_map[layer] == layer for layer in layers)
    return Lending(owns, tuple(slots[layer_map[layer]] for layer in layers))


def lending_slots(layer_map: LayerMap) -> int:
    """How many owners are in use at a time, 0 where no layer borrows."""
    if all(owner == layer for layer, owner in enumerate(layer_map)):
        return 0
    return 1 + max(_slots(layer_map))


def _slots(layer_map: LayerMap) -> list[int]:
    """A slot for each layer's keys and values, free again after the last layer that reads them."""
    last = {owner: layer for layer, owner in enumerate(layer_map)}
    busy: list[int] = []  # until which layer each slot is read
    slots = [0] * len(layer_map)
    for layer, owner in enumerate(layer_map):
        if owner != layer:
            slots[layer] = slots[owner]
            continue
        free = [slot for slot, until in enumerate(busy) if until < layer]
        slots[layer] = free[0] if free else len(busy)
        busy[slots[layer] : slots[layer] + 1] = [last[layer]]
    return slots


def _kind(window: int | None) -> str:
    return "full attention" if window is None else f"a window of {window}"
