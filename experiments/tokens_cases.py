"""What experiments/tokens.py measures: policies by name, cases, and what decides their numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any, Literal

import jax

from kvjax.calibrate.names import CALIBRATED, TUNED, check_name
from kvjax.core.errors import InputError, known
from kvjax.core.layout import Layout
from kvjax.core.rng import fold
from kvjax.evals.evicted import repeat_probe
from kvjax.evals.haystack import Encoder
from kvjax.evals.retrieval_tasks import DEPTHLESS, TASKS
from kvjax.generate.evict import Keep, ProbePrompt
from kvjax.models.config import ModelConfig, layer_runs
from kvjax.policies import Eviction, as_tokens, catalyst_prompt, get, pyramid
from kvjax.policies.retain import Compete

Row = dict[str, Any]

ALL = "all"  # the policy that keeps every token

OWN_FILLER = ("key_value", "key_value_uuid", *DEPTHLESS)  # tasks that read no text

# Of a line: what decides its numbers. With the part it tells which lines a rerun may skip.
SETTINGS = (
    *("kvjax", "model", "weights", "dtype", "method", "calibration", "policy", "budget", "block"),
    *("layout", "seed", "text", "history", "continuation", "windows"),
    *("task", "length", "depths", "samples", "with_question"),
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A policy as it is run.

    Attributes:
      scorer: its name in `kvjax.policies`.
      compete: among whom tokens compete.
      recent: share of the budget that is for the newest tokens.
      probe: the prompt that judges.
      falling: budgets that fall from layer to layer (PyramidKV).
    """

    scorer: str
    compete: Compete = "head"
    recent: float = 0.0
    probe: Literal["repeat", "catalyst"] | None = None
    falling: bool = False


SETUPS = {
    "streaming": Setup("streaming"),
    "h2o": Setup("h2o", recent=0.5),
    "tova": Setup("tova"),
    "snapkv": Setup("snapkv"),
    "pyramidkv": Setup("pyramidkv", falling=True),
    "ada-snapkv": Setup("snapkv", compete="layer"),
    "key-diff": Setup("key-diff"),
    "key-norm": Setup("key-norm"),
    "expected-attention": Setup("expected-attention"),
    "ada-expected-attention": Setup("expected-attention", compete="layer"),
    "kvzip": Setup("kvzip", compete="model", probe="repeat"),
    "kvzip-head": Setup("kvzip", probe="repeat"),
    "catalyst": Setup("kvzip", probe="catalyst"),
    "random": Setup("random"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement, but for the model.

    Attributes:
      part: "fidelity" or "retrieval".
      method: of the codes. policy: a name of `SETUPS`, or "all".
      budget: tokens per KV head (an int) or a share of the history; None with "all".
      history, continuation, windows: of "fidelity". task, length: of "retrieval".
    """

    part: str
    method: str
    policy: str
    budget: int | float | None
    history: int | None = None
    continuation: int | None = None
    windows: int | None = None
    task: str | None = None
    length: int | None = None

    @property
    def label(self) -> str:
        kept = self.policy if self.budget is None else f"{self.policy} {self.budget}"
        where = f"{self.task} at {self.length}" if self.task else f"after {self.history}"
        return f"{kept}, {self.method}, {where}"


def all_cases(config: Any) -> list[Case]:
    """Every case of every part of the config, in order.

    Raises:
      InputError: an unknown part, method, policy or task, a bad budget.
    """
    made = {"fidelity": _fidelity, "retrieval": _retrieval}
    for what, names, of in (
        ("parts", config.parts, made),
        ("policies", (*config.policies, *config.more_policies), (ALL, *SETUPS)),
        ("tasks", config.tasks, TASKS),
    ):
        for name in names:
            if name not in of:
                raise InputError(what, got=repr(name), expected=known(of), fix="use these")
    for name in (*config.methods, *config.more_methods):
        check_name(name, calibration=config.calibration or None)
    for budget in config.budgets:
        as_tokens(budget, config.history)
    return list(dict.fromkeys(case for part in config.parts for case in made[part](config)))


def _kinds(config: Any) -> Iterator[tuple[str, str, int | float | None]]:
    """Methods by policies; then more methods with the few policies that are wanted there."""
    lists = (config.methods, config.policies), (config.more_methods, config.more_policies)
    for methods, policies in lists:
        for method, policy in itertools.product(methods, policies):
            for budget in (None,) if policy == ALL else config.budgets:
                yield method, policy, budget


def _fidelity(config: Any) -> Iterator[Case]:
    lengths = {name: config[name] for name in ("history", "continuation", "windows")}
    for kind in _kinds(config):
        yield Case("fidelity", *kind, **lengths)


def _retrieval(config: Any) -> Iterator[Case]:
    wanted = config.retrieval_policies
    for method, policy, budget in _kinds(config):
        if policy != ALL:
            budget = config.retrieval_budget
        if not wanted or policy in wanted:
            for task, length in itertools.product(config.tasks, config.lengths):
                yield Case("retrieval", method, policy, budget, task=task, length=length)


def own_settings(shared: Row, method: str, task: str | None) -> Row:
    """What all cases of a part share, less what those of a method and task have no part in."""
    calibrated = method in CALIBRATED or method.startswith(TUNED)
    unused = {"calibration": not calibrated}
    unused |= {"text": task in OWN_FILLER, "depths": task in DEPTHLESS}
    return shared | {name: None for name in unused if unused[name]}


def make_keep(
    case: Case,
    model: ModelConfig,
    tokenizer: Encoder | None,
    layout: Layout,
    *,
    history: int,
    block: int,
    seed: int,
) -> Keep | None:
    """Policy, budget and probe of a case; None where all tokens stay.

    Args:
      history: tokens that a share is of, and that the budgets of PyramidKV are made for.
    Raises:
      InputError: a budget below what always stays.
    """
    if case.policy == ALL or case.budget is None:
        return None
    setup = SETUPS[case.policy]
    rng = fold(jax.random.key(seed), "tokens") if setup.scorer == "random" else None
    policy = get(setup.scorer, rng=rng)
    budget = as_tokens(case.budget, history)
    layers = sum(run.length for run in layer_runs(model) if run.window is None)
    made = Eviction(
        policy,
        budget=budget,
        block=block,
        compete=setup.compete,
        recent=int(setup.recent * budget),
    )
    made.check(layers, layout)
    if setup.falling:  # the last layers too must hold what always stays
        sure = made.sink_of(layout) + made.recent_of(layout)
        made = dataclasses.replace(made, budget=pyramid(budget, layers, history, sure))
    return Keep(made, _probe(setup, tokenizer, block))


def _probe(setup: Setup, tokenizer: Encoder | None, block: int) -> ProbePrompt | None:
    if setup.probe is None:
        return None
    assert tokenizer is not None  # texts were cut with it
    if setup.probe == "repeat":
        return repeat_probe(tokenizer, block)
    return ProbePrompt([catalyst_prompt(lambda text: tokenizer.encode(text, bos=False))])


def settings_of(row: Row) -> str:
    """What decides the numbers of a line, as one string."""
    return json.dumps({name: row.get(name) for name in ("part", *SETTINGS)}, sort_keys=True)
