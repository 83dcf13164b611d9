"""Calibrated methods by the names that the command line and tables use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

from kvjax.calibrate.hybrid import klt
from kvjax.calibrate.low_rank_file import load_low_rank
from kvjax.calibrate.moments import Moments
from kvjax.calibrate.oscar import oscar_rotation, pooled, transform
from kvjax.calibrate.rungs import RUNGS
from kvjax.calibrate.tuned_file import load_tuned, with_tuned
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.method import Method
from kvjax.core.rng import fold
from kvjax.methods.latent import latent_method
from kvjax.methods.names import RECIPES, get, recipes
from kvjax.methods.oscar import Variant, oscar
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params

Target = Literal["paper", "code"]
Calibrated = Callable[[Moments, jax.Array], tuple[Method, ...]]  # one per layer

TUNED = "tuned:"  # before the path of what `kvjax tune` wrote
LOWRANK = "lowrank:"  # before that of what `kvjax lowrank` wrote


def _klt(bits: int, **options) -> Calibrated:
    return lambda moments, rng: klt(bits, moments, rng=rng, **options)


def _tiers(bits: int, **options) -> Calibrated:
    """The loop of plain codes: widths of powers of two, scalar levels, a mean that is folded."""
    return _klt(bits, leaf="lloyd_max", mean="after_rope", choices=(0, 2, 4), **options)


def oscar_layers(
    moments: Moments, *, shared: bool = False, variant: Variant = "int2", target: Target = "paper"
) -> tuple[Method, ...]:
    """OSCAR for every layer, in the layout of OSCAR.

    Args:
      shared: one rotation for all KV heads of a layer (the first release), or one for each.
      target: what values are rotated for: the moment of attention outputs, as in the paper, or the
        proxy of the released code.
    """
    values = moments.output_gram if target == "paper" else moments.value_proxy
    grams = moments.query_gram, values  # [l, h, d, d]
    key, value = (oscar_rotation(pooled(gram) if shared else gram) for gram in grams)
    return tuple(
        oscar(transform(k), transform(v), variant=variant) for k, v in zip(key, value, strict=True)
    )


CALIBRATED: dict[str, Calibrated] = {
    **{f"klt-{b}": _klt(b) for b in (2, 3, 4)},
    **{f"klt-fisher-{b}": _klt(b, metric="predictions") for b in (2, 3, 4)},
    **{
        f"klt-fisher-after-rope-{b}": _klt(b, metric="predictions", mean="after_rope")
        for b in (2, 3, 4)
    },
    **{f"klt-after-rope-{b}": _klt(b, mean="after_rope") for b in (2, 3, 4)},
    **{f"klt-pre-rope-{b}": _klt(b, mean="pre_rope") for b in (2, 3, 4)},
    **{
        f"klt-fisher-pre-rope-{b}": _klt(b, metric="predictions", mean="pre_rope")
        for b in (2, 3, 4)
    },
    **{
        f"klt-layers-pre-rope-{b}": _klt(b, metric="predictions", mean="pre_rope", by_layer=True)
        for b in (2, 3, 4)
    },
    **{
        f"klt-lloyd-max-pre-rope-{b}": _klt(b, leaf="lloyd_max", mean="pre_rope") for b in (2, 3, 4)
    },
    **{f"klt-lloyd-max-{b}": _klt(b, leaf="lloyd_max") for b in (2, 3, 4)},
    **{f"klt-layers-{b}": _klt(b, metric="predictions", by_layer=True) for b in (2, 3, 4)},
    **{f"klt-tiers-{b}": _tiers(b) for b in (2, 3)},
    **{f"klt-layers-tiers-{b}": _tiers(b, metric="predictions", by_layer=True) for b in (2, 3)},
    "oscar": lambda moments, rng: oscar_layers(moments),
    "oscar-shared": lambda moments, rng: oscar_layers(moments, shared=True),
    "oscar-lloyd-max": lambda moments, rng: oscar_layers(moments, variant="lloyd_max"),
    **RUNGS,
}


def get_calibrated(
    name: str, moments: Moments, *, layout: Layout | None = None, seed: int = 0
) -> tuple[Method, ...]:
    """The calibrated method called `name`, one `Method` per layer.

    Raises:
      InputError: an unknown name; lists the known ones.
    """
    if name not in CALIBRATED:
        raise InputError(
            "calibrated method", got=repr(name), expected=known(CALIBRATED), fix="use one of these"
        )
    rng = fold(jax.random.key(seed), "methods")
    made = CALIBRATED[name](moments, rng)
    return tuple(dataclasses.replace(m, layout=layout or Layout(), name=name) for m in made)


def get_for_model(
    name: str,
    config: ModelConfig,
    moments: Moments | None = None,
    *,
    layout: Layout | None = None,
    seed: int = 0,
    params: Params | None = None,
) -> Method | tuple[Method, ...]:
    """Any method by name, calibrated or not, as `make_plan` takes it.

    Of a model with latent attention the latent is coded, and what is rotary kept in bf16; of
    `LATENT/ROTARY` the second name codes that (see `latent_method`).

    `tuned:FILE` is the method that `kvjax tune` wrote into FILE, or into that folder, and
    `lowrank:FILE` what `kvjax lowrank` wrote, which needs no moments.

    Args:
      params: only a `lowrank:` file of those weights will do; moments are compared when loaded.
    Raises:
      InputError: an unknown name, a calibrated one without moments, or a file of other moments or
        of another model.
    """
    if config.latent is not None:
        if name.startswith((LOWRANK, TUNED)) or name in CALIBRATED:
            raise InputError(
                "method",
                got=f"{name}, which is fitted to keys and values, for {config.name}",
                expected="a recipe for its latent, or LATENT/ROTARY to code both parts",
                fix="name one of those that need no calibration",
            )
        return latent_method(name, config.latent.rank, config.head_dim, layout=layout, seed=seed)
    if name.startswith(LOWRANK):
        fitted, _ = load_low_rank(name.removeprefix(LOWRANK), config, params)
        layout = layout or Layout()
        return tuple(dataclasses.replace(m, layout=layout, name=name) for m in fitted)
    if name not in CALIBRATED and not name.startswith(TUNED):
        return get(name, config.head_dim, layout=layout, seed=seed)
    if moments is None:
        raise InputError(
            f"method {name}",
            got="no calibration",
            expected="moments of this model",
            fix=f"run `kvjax calibrate --model {config.name}`, and name its folder: --calibration",
        )
    if not name.startswith(TUNED):
        return get_calibrated(name, moments, layout=layout, seed=seed)
    tuned, made = load_tuned(name.removeprefix(TUNED), config, moments)
    methods = with_tuned(get_calibrated(made.method, moments, layout=layout, seed=seed), tuned)
    return tuple(dataclasses.replace(method, name=name) for method in methods)


def fitted_on(
    name: str,
    config: ModelConfig,
    moments: Moments | None = None,
    params: Params | None = None,
) -> str | None:
    """The text that the file behind a `tuned:` or `lowrank:` name was fitted to, None for other
    names.

    Raises:
      InputError: as `get_for_model`, for these names; with `params`, a file for other weights.
    """
    if name.startswith(LOWRANK):
        return load_low_rank(name.removeprefix(LOWRANK), config, params)[1].text
    if name.startswith(TUNED) and moments is not None:
        return load_tuned(name.removeprefix(TUNED), config, moments)[1].text
    return None


def check_name(name: str, calibration: object) -> None:
    """Raises `InputError` for an unknown name, or a calibrated one where `calibration` is None."""
    if name.startswith(LOWRANK):
        return
    calibrated = name in CALIBRATED or name.startswith(TUNED)
    parts = set(name.split("/"))
    if not calibrated and not parts <= set(RECIPES):
        raise InputError(
            "method",
            got=repr(name),
            expected=known([*RECIPES, *CALIBRATED, f"{TUNED}FILE", f"{LOWRANK}FILE"]),
            fix="use one of these names, or KEYS/VALUES to mix two that need no calibration",
        )
    if not calibrated:
        recipes(name)
    elif calibration is None:
        raise InputError(
            f"method {name}",
            got="no --calibration",
            expected="the folder of a calibration",
            fix="run `kvjax calibrate` first",
        )
