"""One model and what its conversations share; lines that are there are not measured again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conversations_cases import Case, Row, settings_of
from conversations_session import Session
from frontier_cases import append_row, read_rows
from ml_collections import ConfigDict

import kvjax
from kvjax.calibrate.artefact import load_moments
from kvjax.calibrate.names import get_for_model
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.episodes import Conversation
from kvjax.episodes.embed import minilm, of_model
from kvjax.generate.plan import Plan, make_plan
from kvjax.models.fingerprint import fingerprint
from kvjax.models.load import Model
from kvjax.models.tokenizer import Tokenizer


class Bench:
    """One model, and what its measurements share."""

    def __init__(self, model: Model, config: ConfigDict, folder: Path, stamp: dict[str, Any]):
        self.model, self.config, self.path = model, config, folder / "metrics.jsonl"
        assert model.tokenizer is not None
        self.tokenizer: Tokenizer = model.tokenizer
        self.made = {name: stamp[name] for name in ("git", "device")}
        self.moments, self.calibration = None, None
        if config.calibration:
            self.moments, made = load_moments(config.calibration, model.config, model.params)
            self.calibration = dataclasses.asdict(made)
        self.plan = functools.lru_cache(self.make_plan)
        self.embedder = functools.lru_cache(self.make_embedder)
        self.shared = {
            "kvjax": kvjax.__version__,
            "model": model.config.name,
            "weights": fingerprint(model.params),
            "dtype": str(model.params.embed.dtype),
            "data": _digest(config.data),
            "limit": config.limit,
            "budget": config.budget,
            "block": config.block,
            "layout": list(config.layout),
            "episodes": config.episodes,
            "embedder": config.embedder,
            "seed": config.seed,
        }

    def make_plan(self, method: str) -> Plan:
        sink, recent, page = self.config.layout
        layout = Layout(sink=sink, recent=recent, page=page)
        config = self.model.config
        made = get_for_model(method, config, self.moments, layout=layout, seed=self.config.seed)
        return make_plan(config, made)

    def make_embedder(self):
        if self.config.embedder == "minilm":
            return minilm()
        return of_model(self.model.params, self.tokenizer)

    def settings(self, conversation: str, case: Case, method: str) -> Row:
        """What decides the numbers of a line."""
        own = {"case": case.name, "method": method, "conversation": conversation}
        made = self.calibration if method.startswith(("klt", "tuned", "centred")) else None
        return {**self.shared, **own, "calibration": made}

    def run(self, conversation: Conversation, cases: Sequence[Case]) -> list[str]:
        """Measures what metrics.jsonl does not have yet; what could not be done, and why."""
        done = {settings_of(row) for row in read_rows(self.path)}
        wanted = [(case, self.methods(case)) for case in cases]
        todo = [
            (case, missing)
            for case, methods in wanted
            if (missing := [m for m in methods if self.key(conversation, case, m) not in done])
        ]
        count = sum(len(methods) for _, methods in wanted)
        left = sum(len(methods) for _, methods in todo)
        print(f"{conversation.name}: {count - left} of {count} are there", flush=True)
        if not todo:
            return []
        session = Session(self, conversation)
        failures = []
        for case, missing in todo:
            try:
                for row in session.rows(case, missing):
                    append_row(self.path, row)
                    print(_line(row), flush=True)
            except InputError as error:  # a budget below the windows, say
                failures.append(f"{conversation.name} {case.name}: {error}")
        return failures

    def methods(self, case: Case) -> list[str]:
        return ["bf16", *(self.config.methods if case.name in self.config.coded else ())]

    def key(self, conversation: Conversation, case: Case, method: str) -> str:
        return settings_of(self.settings(conversation.name, case, method))


def _digest(path: str) -> str:
    if not path:
        return "made up"
    content = Path(path).read_bytes()
    return f"{Path(path).name} (sha256 {hashlib.sha256(content).hexdigest()[:12]})"


def _line(row: Row) -> str:
    kls = ", ".join(f"{how} {np.mean(s['kl']):.4f}" for how, s in row["routes"].items())
    return (
        f"{row['conversation']} {row['case']}, {row['method']}: KL {kls}; "
        f"{row['full_bytes'] / row['active_bytes']:.1f}x; {row['seconds_to_read']:.0f} s to read, "
        f"{row['seconds_per_question']:.2f} s a question"
    )
