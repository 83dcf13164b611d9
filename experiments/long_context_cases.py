"""What experiments/long_context.py measures, and the lines of metrics.jsonl."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any, get_args

from kvjax.calibrate.names import CALIBRATED, check_name
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.evals.needles import Direction, Margin
from kvjax.models.config import ModelConfig, known_configs

PARTS = ("needles", "speed", "text")
RUN = "run"  # of a line: what another run of the same case has otherwise, times above all
# What these are made of is not known of a drawn layer: how its model weighs values and outputs (and
# for methods before RoPE what its keys and queries are there).
_UNKNOWN = ("oscar", "klt-fisher", "klt-layers", "tuned:")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: one line.

    Attributes:
      shape: of the layer; the model of "text". context: packed tokens; of "text", tokens.
      methods: one, but of "speed", whose methods take turns.
      layer: of the calibration, that a shape begins with; None of "text".
      direction: of needles.
    """

    part: str
    shape: str
    context: int
    methods: tuple[str, ...]
    layer: int | None = None
    direction: Direction | None = None

    @property
    def label(self) -> str:
        kind = f", {self.direction}" if self.direction else ""
        return f"{self.part}: {self.shape} at {self.context}, {', '.join(self.methods)}{kind}"


def all_cases(config: Any) -> list[Case]:
    """Every case of every part of the config, in order: short contexts first.

    Raises:
      InputError: an unknown part, shape or method, or one that needs what is not known of a layer.
    """
    for part in config.parts:
        if part not in PARTS:
            raise InputError("parts", got=repr(part), expected=known(PARTS), fix="use these")
    for name in (*config.methods, *config.speed_methods):
        check_name(name, calibration=True)
        if name.startswith(_UNKNOWN) or "pre-rope" in name:
            raise InputError(
                f"method {name}",
                got="a layer of which only queries, keys and values are known",
                expected="a method without sensitivities, moments of outputs or before RoPE",
                fix="use klt, klt-lloyd-max, balanced or centred, or a method without calibration",
            )
    for name in config.text_methods:
        check_name(name, calibration=config.text_calibration or None)
    layers = dict(map(tuple, config.shapes))
    cases = []
    if "needles" in config.parts:
        for direction in config.directions:
            if direction not in get_args(Direction):
                expected = known(get_args(Direction))
                raise InputError("directions", got=direction, expected=expected, fix="use these")
        for context, (shape, layer), direction in itertools.product(
            config.contexts, config.shapes, config.directions
        ):
            given = {"layer": layer, "direction": direction}
            cases += [Case("needles", shape, context, (m,), **given) for m in config.methods]
    if "speed" in config.parts:
        for shape, context in itertools.product(config.speed_shapes, config.speed_contexts):
            if shape not in layers:
                raise InputError("speed_shapes", got=shape, expected=known(layers), fix="use these")
            methods = tuple(config.speed_methods)
            cases.append(Case("speed", shape, context, methods, layers[shape]))
    if "text" in config.parts:
        of_text = config.text_model, config.text_context
        cases += [Case("text", *of_text, (method,)) for method in config.text_methods]
    return cases


def margins(config: Any) -> tuple[Margin, ...]:
    """Those of the config."""
    return tuple(Margin(float(nats), int(base) or None) for nats, base in config.margins)


def mesh_of(config: Any) -> tuple[int, int]:
    """Devices over heads and over the sequence.

    Raises:
      InputError: sizes that do not make up the devices.
    """
    heads, sequence = config.mesh
    sequence = sequence or config.devices // max(heads, 1)
    if min(heads, sequence) < 1 or heads * sequence != config.devices:
        raise InputError(
            "mesh",
            got=f"{heads} x {sequence} for {config.devices} devices",
            expected="devices over heads and over the sequence, all of them",
            fix="set config.mesh, with 0 for what is left",
        )
    return heads, sequence


def layout_of(config: Any) -> Layout:
    """Windows and pages of all caches."""
    sink, recent, page = config.layout
    return Layout(sink=sink, recent=recent, page=page)


def shape_config(name: str, own: ModelConfig) -> ModelConfig:
    """The model whose shape is meant: the calibrated one, or one that is known by its sizes.

    Raises:
      InputError: an unknown name.
    """
    shapes = {own.name: own} | {k: v for k, v in known_configs().items() if k != own.name}
    if name not in shapes:
        raise InputError("shape", got=repr(name), expected=known(shapes), fix="use one of these")
    return shapes[name]


def is_calibrated(methods: Sequence[str]) -> bool:
    """Whether one of these needs moments."""
    return any(name in CALIBRATED or name.startswith("tuned:") for name in methods)


def settings_of(row: Row) -> str:
    """What decides the numbers of a line, as one string."""
    return json.dumps(row["settings"], sort_keys=True)
