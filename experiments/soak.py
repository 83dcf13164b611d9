"""Does a shared pool of pages stay sound, and memory flat, however long sequences come and go?

Question: over 200,000 tokens of 64 ragged sequences, with prefixes shared by forks, ends at any
          time and a pool that is sometimes too small: is every page given back, does every
          sequence read what it holds, does anything grow or compile again?
Command:  python experiments/soak.py --config=configs/soak.py
          (a tiny run, half a minute: --config=configs/soak.py:tiny)
          With a sliding window: --config.window=64 --config.pool=200
Cost:     about a minute on two CPU cores.
Expected: nothing broken, no bytes of arrays more than after the warm-up, nothing compiled after
          it; some sequences find no free page and read as NaN, and no other does.

Every step adds a token to most sequences and attends after it. A sequence that reaches its (random)
end or finds no free page is reset, and begins again, empty or as a fork of a prefix. A check takes
`kvjax.cache.invariants`, and attention of every sequence against a fresh contiguous cache of the
tokens that it should hold, which are kept outside. Writes config.json, stamp.json, metrics.jsonl
(a line per check) and summary.json into `config.out`; ends with an error if something is broken.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app
from ml_collections import ConfigDict, config_flags

import kvjax
from kvjax.cache import invariants, reset
from kvjax.cache.pages import LOST
from kvjax.cli.compare import write_json
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout
from kvjax.evals.stamp import make_stamp

_CONFIG = config_flags.DEFINE_config_file("config")
TOLERANCE = 1e-5  # codes are the same ones; pages are summed in another order


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    stamp = make_stamp(seed=config.seed, command=shlex.join(["python", *sys.argv]))
    write_json(folder / "stamp.json", stamp)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:

        def note(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)

        summary = run(config, note)
    write_json(folder / "summary.json", summary)
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    if summary["broken"]:
        sys.exit("something is broken: see above")


def run(config: ConfigDict, note: Callable[[dict[str, Any]], None] = print) -> dict[str, Any]:
    """The whole soak; `note` is told of every check. What was counted and measured."""
    if not 0 < config.active <= 1:
        raise InputError(
            "active", got=config.active, expected="a share above 0 and up to 1", fix="0.9, say"
        )
    soak = Soak(config)
    compiled = 0

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        del duration_secs, about
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    begin, rows = time.perf_counter(), []
    warm: dict[str, int] = {}
    while soak.counts["tokens"] < config.tokens:
        soak.step()
        if soak.counts["steps"] % config.check_every:
            continue
        rows.append(soak.check())
        note(rows[-1])
        if not warm and soak.counts["steps"] >= config.warm_up:
            warm = {"compiled": compiled, **memory()}
    last = soak.check()
    jax.monitoring.unregister_event_duration_listener(listen)
    if not warm:
        raise InputError(
            "tokens",
            got=f"{config.tokens}, which took {soak.counts['steps']} steps",
            expected=f"enough for a check after {config.warm_up} steps of warm-up",
            fix="raise tokens, or lower warm_up and check_every",
        )
    now = memory()
    most = lambda name: max([*(row[name] for row in rows), last[name]])
    return {
        **soak.counts,
        "seconds": round(time.perf_counter() - begin, 1),
        "pool": config.pool,
        "most_pages_read": soak.most_pages,
        "most_readers_of_a_page": soak.most_readers,
        "largest_difference": most("difference"),
        "compiled_after_warm_up": compiled - warm["compiled"],
        "programs": {name: f._cache_size() for name, f in soak.programs().items()},
        "live_bytes_after_warm_up": warm["live"],
        "live_bytes_at_the_end": now["live"],
        "rss_after_warm_up": warm["rss"],
        "rss_at_the_end": now["rss"],
        "broken": soak.broken,
    }


class Soak:
    """A cache of sequences that come and go, and beside it what each of them should hold."""

    def __init__(self, config: ConfigDict):
        self.config, self.rng = config, np.random.default_rng(config.seed)
        sink, recent, page = config.layout
        plain = Layout(sink=sink, recent=recent, page=page)
        method = kvjax.methods.get(config.method, head_dim=config.head_dim, layout=plain)
        self.plain, self.block = method, page
        self.method = method.with_layout(
            Layout(sink=sink, recent=recent, page=page, pool=config.pool)
        )
        self.cache, self.fresh = self.init(self.method), self.init(self.plain)
        b, room = config.sequences, config.capacity + -config.capacity % page
        self.k = np.zeros((b, room, config.kv_heads, config.head_dim), np.float32)
        self.v = np.zeros_like(self.k)
        self.length = np.zeros(b, int)
        self.end = np.array([self.draw_end(row) for row in range(b)])
        names = "steps", "tokens", "resets", "forks", "lost", "checks"
        self.counts = dict.fromkeys(names, 0)
        self.most_pages = self.most_readers = 0
        self.broken: list[str] = []
        # Of this soak alone, so that their programs can be counted.
        self.append = jax.jit(functools.partial(append_and_attend), donate_argnums=1)
        self.reset = jax.jit(functools.partial(reset), donate_argnums=0)
        self.fork = jax.jit(functools.partial(kvjax.fork), donate_argnums=0)
        self.attend = jax.jit(functools.partial(kvjax.attend))
        self.reference = jax.jit(functools.partial(attend_to_all, block=self.block))
        self.cache = self.fork(self.cache, jnp.int32(0), jnp.int32(0))  # compiled ahead

    def init(self, method: kvjax.Method) -> kvjax.Cache:
        config = self.config
        sizes = {name: config[name] for name in ("capacity", "kv_heads", "head_dim")}
        return kvjax.init(
            method, batch=config.sequences, window=config.window or None, dtype=jnp.float32, **sizes
        )

    def programs(self) -> dict[str, Any]:
        """The jitted functions by name."""
        names = "append", "reset", "fork", "attend", "reference"
        return {name: getattr(self, name) for name in names}

    def table(self) -> np.ndarray:
        """The page table `[b, n]`."""
        assert self.cache.page_table is not None
        return np.asarray(self.cache.page_table[0])

    def readers(self) -> np.ndarray:
        """Of each page of the pool, how many there are."""
        assert self.cache.page_readers is not None
        return np.asarray(self.cache.page_readers[0])

    def draw_end(self, row: int) -> int:
        """How long a sequence gets; prefixes wait at their end."""
        if row < self.config.prefixes:
            return self.config.prefix
        return int(self.rng.integers(self.block, self.config.capacity + 1))

    def draw_queries(self) -> np.ndarray:
        b, h, g, d = (self.config[n] for n in ("sequences", "kv_heads", "queries", "head_dim"))
        return self.rng.normal(size=(b, h, g, d)).astype(np.float32)

    def step(self) -> None:
        """A token for most sequences; those that have ended begin anew."""
        b, rng = self.config.sequences, self.rng
        active = (rng.random(b) < self.config.active) & (self.length < self.end)
        k, v = rng.normal(size=(2, b, *self.k.shape[2:])).astype(np.float32)
        out, self.cache = self.append(
            self.method, self.cache, self.draw_queries(), k, v, jnp.asarray(active)
        )
        rows = np.flatnonzero(active)
        self.k[rows, self.length[rows]], self.v[rows, self.length[rows]] = k[rows], v[rows]
        self.length += active
        self.counts["steps"] += 1
        self.counts["tokens"] += len(rows)
        lost = self.check_lost(np.isnan(np.asarray(out)).any((1, 2, 3)))
        self.counts["lost"] += int(lost.sum())
        ended = lost | (self.length >= self.end)
        ended[: self.config.prefixes] = rng.random(self.config.prefixes) < self.config.renewed
        ended |= lost
        if ended.any():
            self.begin_anew(ended)

    def check_lost(self, ill: np.ndarray) -> np.ndarray:
        """Who reads as NaN: all who found no free page, and nobody else."""
        readers = self.readers()
        self.most_pages = max(self.most_pages, int((readers > 0).sum()))
        self.most_readers = max(self.most_readers, int(readers.max()))
        lost = (self.table() == LOST).any(1)
        if (lost != ill).any():
            self.tell(f"sequences {np.flatnonzero(ill)} are NaN, {np.flatnonzero(lost)} lost pages")
        if lost.any() and (readers == 0).any():
            self.tell(f"sequences {np.flatnonzero(lost)} lost pages, and some are free")
        return lost

    def begin_anew(self, ended: np.ndarray) -> None:
        self.cache = self.reset(self.cache, jnp.asarray(ended))
        self.length[ended] = 0
        self.counts["resets"] += int(ended.sum())
        for row in np.flatnonzero(ended).tolist():
            self.end[row] = self.draw_end(row)
            if row < self.config.prefixes or self.rng.random() >= self.config.forked:
                continue
            source = int(self.rng.integers(self.config.prefixes))
            self.cache = self.fork(self.cache, jnp.int32(source), jnp.int32(row))
            self.k[row], self.v[row] = self.k[source], self.v[source]
            self.length[row] = self.length[source]
            self.end[row] = max(self.end[row], self.length[row] + 1)
            self.counts["forks"] += 1

    def check(self) -> dict[str, Any]:
        """Invariants, and attention against a fresh cache of the same tokens."""
        for line in invariants(self.method, self.cache):
            self.tell(line)
        if (np.asarray(self.cache.length[0]) != self.length).any():
            self.tell(f"lengths {self.cache.length[0].tolist()}, not {self.length.tolist()}")
        q, count = self.draw_queries(), jnp.asarray(self.length, jnp.int32)
        want = np.asarray(self.reference(self.plain, self.fresh, q, self.k, self.v, count))
        got = np.asarray(self.attend(self.method, self.cache, q))
        difference = float(np.abs(got - want).max())
        if not difference < TOLERANCE:
            self.tell(f"attention differs by {difference:.1e} from that of a fresh cache")
        self.counts["checks"] += 1
        readers = self.readers()
        return {
            "step": self.counts["steps"],
            "tokens": self.counts["tokens"],
            "pages": int((readers > 0).sum()),
            "shared": int((readers > 1).sum()),
            "lost": self.counts["lost"],
            "difference": difference,
            **memory(),
        }

    def tell(self, line: str) -> None:
        self.broken.append(f"step {self.counts['steps']}: {line}")


def append_and_attend(method, cache, q, k, v, active):
    """A token for the active sequences, and attention of all."""
    cache = kvjax.append(method, cache, k, v, active=active)
    return kvjax.attend(method, cache, q), cache


def attend_to_all(method, cache, q, k, v, count, *, block: int):
    """Attention after `count: [b]` of the tokens `[b, t, h, d]`, in a cache that is empty."""

    def one(cache, part):
        k, v, first = part
        now = jnp.clip(count - first, 0, block)
        return kvjax.extend(method, cache, k[:, :, :, None], k, v, count=now)[1], None

    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, block, *a.shape[2:]), 1, 0)
    firsts = jnp.arange(0, k.shape[1], block)
    cache, _ = jax.lax.scan(one, cache, (split(k), split(v), firsts))
    return kvjax.attend(method, cache, q)


def memory() -> dict[str, int]:
    """Bytes of all arrays that live, and of the process."""
    live = sum(a.nbytes for a in jax.live_arrays())
    return {"live": live, "rss": next(_resident(), 0)}


def _resident() -> Iterator[int]:
    status = Path("/proc/self/statm")
    if status.exists():  # Linux
        yield int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    app.run(main)
