"""`kvjax generate --policy`: a budget of the prompt, its true bytes, and mistakes told."""

from __future__ import annotations

import argparse
import re

import jax
import jax.numpy as jnp
import pytest
from memory_model import fails, tiny_model

from kvjax.cli import generate as command
from kvjax.cli import options
from kvjax.cli.main import main
from kvjax.core.layout import Layout
from kvjax.models.config import known_configs
from kvjax.models.load import load

PROMPT = "the quick brown fox jumps over the lazy dog " * 7
LAYOUT = ["--sink", "2", "--recent", "16", "--page", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("kvjax.cli.options.use_compilation_cache", lambda: None)


@pytest.mark.parametrize(
    "more",
    [
        ["snapkv", "--compete", "layer"],
        ["pyramidkv"],
        ["kvzip"],
        ["streaming", "--keep-exact"],
    ],
)
def test_summary_has_budget_and_true_bytes(model, capsys, monkeypatch, more):
    held = []
    real = command.summary_of_kept

    def watched(plan, state, *rest):
        held.append(sum(a.nbytes for a in jax.tree.leaves(state.caches)))
        return real(plan, state, *rest)

    monkeypatch.setattr(command, "summary_of_kept", watched)
    argv = ["generate", PROMPT, "--model", str(model), "--max-new", "6", *LAYOUT]
    assert main([*argv, "--budget", "96", "--block", "64", "--policy", *more]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    form = "bf16" if "--keep-exact" in more else "turboquant-3"
    assert f"[{more[0]}, 96 tokens per head, {form}: {len(PROMPT)} + 6 tokens" in captured.err
    full = (len(PROMPT) + 6) * 2 * 2 * 3 * 2 * 16  # K and V, bf16, layers, heads, head_dim
    mib, share = re.search(r"cache ([\d.]+) MiB, ([\d.]+) of", captured.err).groups()
    assert float(mib) == pytest.approx(held[0] / 2**20, abs=0.006)
    assert float(share) == pytest.approx(held[0] / full, abs=0.006)
    assert held[0] < full


def test_a_budget_that_holds_all_changes_nothing(model, capsys):
    argv = ["generate", PROMPT, "--model", str(model), "--max-new", "6", "--method", "bf16"]
    assert main([*argv, *LAYOUT]) == 0
    plain = capsys.readouterr().out
    more = ["--policy", "streaming", "--budget", "400", "--block", "64"]
    assert main([*argv, *LAYOUT, *more]) == 0
    assert capsys.readouterr().out == plain


def test_budgets_by_layer_as_the_paper_has_them():
    config = known_configs()["llama-3.1-8b"]
    layout = Layout()
    make = lambda name: options.eviction_of(
        config, name, 512, 256, "head", tokens=8000, layout=layout
    )
    pyramid = make("pyramidkv")
    pyramid.check(config.layers, layout)
    assert len(pyramid.budgets) == config.layers
    assert sum(pyramid.budgets) == 512 * config.layers
    assert pyramid.budgets[0] > pyramid.budgets[-1]
    assert make("snapkv").budget == 512
    assert make("h2o").recent == 256
    assert make("random").budget == 512


def test_kvzip_is_asked_to_repeat_the_block(model):
    loaded = load(model, dtype=jnp.float32)
    args = argparse.Namespace(
        policy="kvzip",
        budget=96,
        block=32,
        compete=None,
        keep_exact=False,
        sink=2,
        recent=16,
        page=16,
    )
    keep = command.make_keep(args, loaded, 300)
    rows, lengths = keep.probe.padded([[5] * 32], [[7] * 32])
    ids = rows[0, : lengths[0]].tolist()
    assert ids[-40:] == [7] * 8 + [5] * 32
    assert "Repeat" in loaded.tokenizer.decode(ids).replace(" ", "")


def test_mistakes_end_in_one_line(model, capsys):
    bad = lambda *more: fails(main, capsys, "generate", "abc", "--model", model, *LAYOUT, *more)
    assert "kvjax episodes" in bad("--policy", "epicache", "--budget", 96)
    assert "--budget 512" in bad("--policy", "h2o")
    assert "no --policy" in bad("--budget", 96)
    assert "no --policy" in bad("--keep-exact")
    assert "streaming, h2o" in bad("--policy", "lru", "--budget", 96)
    assert "judges whole blocks" in bad("--policy", "kvzip", "--budget", 96, "--keep-exact")
    assert "--budget" in bad("--policy", "h2o", "--budget", 0)
    assert "--block" in bad("--policy", "h2o", "--budget", 96, "--block", 0)
    assert "head, layer or model" in bad("--policy", "h2o", "--budget", 96, "--compete", "all")
    assert "always stay" in bad("--policy", "h2o", "--budget", 20)
