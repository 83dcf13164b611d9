"""Which tuning of `packed_decode` is fastest here: small sweeps for the headline formats."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.arg_specs import Spec
from pallas_kernels.bench import timing
from pallas_kernels.bench.attention import inputs, packed_program
from pallas_kernels.bench.cases import HEADLINE, OWN, TINY, Case
from pallas_kernels.bench.check import check
from pallas_kernels.bench.results import Problem, Row
from pallas_kernels.bench.setting import Room, Setting, attempt
from pallas_kernels.packed_decode.config import Config, heuristic
from pallas_kernels.packed_decode.tuned import narrowest, signature, tuned_file

CASES = (Case(1, 131072), Case(8, 32768))
VARIANTS = (  # page, tokens of a step, warps, passes
    (256, 256, 2, 1),
    (256, 256, 4, 1),
    (256, 256, 2, 2),
    (256, 256, 4, 2),
    (256, 512, 4, 1),
    (64, 256, 2, 1),
    (64, 256, 4, 1),
    (64, 128, 2, 1),
)
SPLITS = (0.5, 2.0)  # of what the heuristic says, tried with the best of the variants

Choice = tuple[int, Config]  # page, and the rest


def _cases(tiny: bool) -> tuple[Case, ...]:
    return TINY if tiny else CASES


def _pairs(tiny: bool) -> tuple[str, ...]:
    return HEADLINE[1:2] if tiny else (OWN, *HEADLINE)


def _name(case: Case, pair: str) -> str:
    return f"{case.name.replace('attention', 'sweep')}/{pair}"


def units(tiny: bool) -> list[str]:
    """Ids of all rows."""
    return [_name(case, pair) for case in _cases(tiny) for pair in _pairs(tiny)]


def measure(wanted: Sequence[str], setting: Setting) -> Iterator[list[Row]]:
    """One row per format and shape: its best tuning, and all that were tried."""
    for case in _cases(setting.tiny):
        for pair in _pairs(setting.tiny):
            if _name(case, pair) in wanted:
                row, entry = _sweep(case, pair, setting)
                if setting.tune and entry is not None:
                    write_tuned(entry, setting.stamp)
                yield [row]


@dataclasses.dataclass(frozen=True)
class _Runner:
    """One format at one shape: inputs by page, and what has been compiled so far.

    Attributes:
      default: what is used without tuning.
    """

    makers: dict[int, tuple[Spec, dict[str, Any]]]
    default: Choice
    setting: Setting
    found: dict[Choice, Any] = dataclasses.field(default_factory=dict)

    def race(self, choices: Sequence[Choice]) -> dict[Choice, float]:
        """Median seconds of the choices that compile, and of the default."""
        choices = list(dict.fromkeys([self.default, *choices]))
        new = [c for c in choices if c not in self.found]
        build = lambda c: attempt(packed_program, *self.makers[c[0]], self.setting, c[1])
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            self.found.update(zip(new, pool.map(build, new), strict=True))
        programs = {c: f[0] for c in choices if not isinstance(f := self.found[c], str)}
        times = timing.race(programs, rounds=min(self.setting.rounds, 9))
        return {c: time.median for c, time in times.items()}


def _runner(case: Case, pair: str, variants, setting: Setting) -> _Runner | str:
    """Inputs of a format whose numbers are right, or why there are none."""
    makers, room = {}, Room()
    for page in dict.fromkeys([case.page, *(page for page, *_ in variants)]):
        small = case.spec(pair, page=page, batch=2, kv_heads=1, tokens=5 * page)
        verdict = attempt(check, small, setting.backend)
        reason = verdict if isinstance(verdict, str) else verdict.reason
        made = reason or inputs(case, pair, page, setting, room)
        if isinstance(made, str):
            return made
        makers[page] = made
    return _Runner(makers, (case.page, _default(makers[case.page][0])), setting)


def _sweep(case: Case, pair: str, setting: Setting) -> tuple[Row, dict[str, Any] | None]:
    variants = () if setting.tiny else VARIANTS
    runner = _runner(case, pair, variants, setting)
    row: Row = {"id": _name(case, pair)}
    if isinstance(runner, str):
        return row | {"skipped": runner}, None
    first = runner.race([_choice(runner, *v) for v in variants])
    page, config = min(first, key=first.__getitem__) if first else runner.default
    splits = (max(1, round(share * config.splits)) for share in SPLITS)
    more = [(page, dataclasses.replace(config, splits=s)) for s in splits]
    times = runner.race([(page, config), *more])
    failed = {_text(c): found for c, found in runner.found.items() if isinstance(found, str)}
    if not times:
        return row | {"skipped": "; ".join(failed.values())}, None
    page, config = best = min(times, key=times.__getitem__)
    spec, args = runner.makers[page]
    usual = times.get(runner.default)
    tried = {_text(c): t * 1e6 for c, t in {**first, **times}.items()}
    row |= {
        "us": times[best] * 1e6,
        "GB/s": spec.bytes() / times[best] / 1e9,
        "x_default": None if usual is None else usual / times[best],
        "best": _text(best),
        "failed": len(failed) or None,
        "config": {"tried": tried, "failed": failed},
    }
    fields = ("batch", "kv_heads", "group", "head_dim", "tokens")
    entry = {
        "key": signature(args["key"]),
        "value": signature(args["value"]),
        "shape": {field: getattr(spec, field) for field in fields},
        "page": page,
        "config": dataclasses.asdict(config),
        "us": times[best] * 1e6,
        "us_default": None if usual is None else usual * 1e6,
    }
    return row, entry


def _choice(runner: _Runner, page: int, tokens: int, warps: int, passes: int) -> Choice:
    changes = {"tokens": tokens, "warps": warps, "passes": passes}
    return page, dataclasses.replace(_default(runner.makers[page][0]), **changes)


def _default(spec: Spec) -> Config:
    """What `packed_decode` takes by itself."""
    args = spec.shapes()
    bits = narrowest(args["key"], args["value"])
    return heuristic(spec.batch, spec.kv_heads, spec.slots, spec.page, unit_bits=bits)


def _text(choice: Choice) -> str:
    page, config = choice
    return f"page={page}," + ",".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())


def write_tuned(entry: dict[str, Any], stamp: Row, folder: Path | None = None) -> None:
    """Adds an entry to the file of this device, in the place of one for the same launch.

    Raises:
      Problem: the folder cannot be written.
    """
    path = tuned_file(str(stamp["device"]), folder)
    same = lambda old: all(old[k] == entry[k] for k in ("key", "value", "shape"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"entries": []}
        entries = [old for old in kept["entries"] if not same(old)]
        entry = {**entry, **{k: stamp[k] for k in ("date", "commit", "jax")}}
        text = json.dumps({"device": stamp["device"], "entries": [*entries, entry]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise Problem(
            "--tune",
            got=f"{path} ({error.strerror or error})",
            expected="a file that can be written",
            fix="run in a checkout, or leave --tune out",
        ) from None
