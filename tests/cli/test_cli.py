"""The command line on a tiny model: results, and one clear line for every wrong input."""

import json
import shutil
from pathlib import Path

import pytest
from memory_model import tiny_model
from safetensors.numpy import load_file, save_file

from kvjax.cli.main import main

TINY = Path(__file__).parents[1] / "models" / "tiny" / "qwen3"
ROW = {
    "method", "bits_per_value", "bits_per_value_total", "cache_bytes", "bf16_bytes", "ppl", "kl",
    "kl_se", "top1", "logit_db", "decode_tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 40, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))


def fails(capsys, *argv) -> str:
    """Runs a command that must fail: status 2 and one line on stderr, which it returns."""
    assert main([str(a) for a in argv]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.endswith(" ...")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("kvjax: ")
    assert "got" in lines[0]
    assert "expected" in lines[0]
    return lines[0]


def test_compare_writes_what_other_tools_read(folder, text, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--context", "128", "--recent", "16", "--page", "16", "--sink", "2", "--rounds", "1"]
    methods = "bf16,turboquant-3,int4/turboquant-2"
    status = main(
        ["compare", "--model", str(folder), "--text", str(text), "--methods", methods, *args]
        + ["--out", str(out), "--seed", "3", "--samples", "turboquant-3"]
    )
    assert status == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"model", "text", "context", "layout", "stamp", "rows"} <= set(metrics)
    assert metrics["layout"] == {"sink": 2, "recent": 16, "page": 16}
    assert metrics["stamp"]["seed"] == 3
    assert [row["method"] for row in metrics["rows"]] == methods.split(",")
    for row in metrics["rows"]:
        assert set(row) >= ROW
        assert row["decode_tokens_per_s"] > 0
        assert row["bits_per_value_total"] > row["bits_per_value"]
    exact, packed, _ = metrics["rows"]
    assert exact["kl"] < 1e-3 * packed["kl"] + 1e-6
    assert len(metrics["samples"]) == 6
    report = (out / "report.html").read_text()
    assert "turboquant-3" in report
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.partial"))
    assert "turboquant-3" in capsys.readouterr().out


def test_generate_streams_and_reports(folder, capsys):
    assert main(["generate", "hello", "--model", str(folder), "--max-new", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "tokens/s" in captured.err
    assert "of bf16's" in captured.err


def test_memory_is_exact(capsys):
    assert main(["memory", "--model", "llama-3.1-70b", "--context", "131072", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["plain_bf16"] == {"bytes_per_token": 327_680, "bytes": 40 * 2**30}
    rows = {row["method"]: row for row in data["rows"]}
    assert rows["kivi-2"]["bits_per_value"] == pytest.approx(3.0, abs=1e-3)
    assert rows["turboquant-4"]["bits_per_value"] == pytest.approx(4.125, abs=1e-3)


def test_memory_reads_a_config(capsys):
    assert main(["memory", "--model", str(TINY), "--methods", "bf16", "--context", "64"]) == 0
    assert "B per token" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["turboquant-prod-3"], ["kivi-2/int4", "--head-dim", "96"]])
def test_describe(argv, capsys):
    assert main(["describe", *argv]) == 0
    assert "bits per value" in capsys.readouterr().out


def test_unknown_names_list_the_known(capsys, folder):
    assert "turboquant-3" in fails(capsys, "compare", "--methods", "turbo-3")
    assert "turboquant-3" in fails(capsys, "generate", "x", "--method", "bf16/nope")
    assert "smollm2-135m" in fails(capsys, "compare", "--model", "smollm3")
    assert "llama-3.1-70b" in fails(capsys, "memory", "--model", "llama-9")
    assert "gemma-3-270m" in fails(capsys, "models", "fetch", "llama-9")
    assert "fetch smollm2-135m" in fails(capsys, "generate", "x", "--model", "smollm2-135m")


def test_sizes_that_do_not_fit(capsys, folder, text):
    model = ["--model", folder, "--text", text, "--methods", "bf16,int4"]
    assert "positions" in fails(capsys, "compare", *model, "--context", 10**6)
    assert "multiple of the page" in fails(capsys, "compare", *model, "--recent", 100)
    assert "multiple of 16" in fails(
        capsys, "compare", *model, "--page", 18, "--recent", 18, "--context", 64
    )
    assert "multiple of 16" in fails(capsys, "compare", *model, "--context", 257)
    assert "--context" in fails(capsys, "compare", *model, "--context", 0)
    assert "divisor" in fails(
        capsys, "compare", *model, "--methods", "kivi-2", "--page", 16, "--context", 64
    )
    assert "divisor of 48" in fails(capsys, "describe", "kivi-2", "--head-dim", 48)
    assert "positions" in fails(capsys, "generate", "abc", "--model", folder, "--max-new", 10**6)
    assert "page" in fails(capsys, "memory", "--page", 0)
    assert "got no names" in fails(capsys, "memory", "--methods", ",")
    assert "--rounds" in fails(capsys, "compare", *model, "--rounds", -1)
    assert "got nan" in fails(capsys, "generate", "abc", "--model", folder, "--temperature", "nan")
    assert "--dims" in fails(capsys, "distortion", "--dims", "²")


def test_lists_go_on_where_a_method_does_not_fit(capsys, tmp_path):
    """Of a head_dim that groups of 32 do not divide: others are told, and this one why not."""
    config = json.loads((TINY / "config.json").read_text()) | {"head_dim": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["memory", "--model", str(tmp_path), "--context", "64"]) == 0
    captured = capsys.readouterr()
    assert {"int4", "turboquant-3"} <= {line.split(" ")[0] for line in captured.out.splitlines()}
    assert "\nkivi-2 " not in captured.out
    assert "kvjax: left out kivi-2: group of channels: got 32 on 48" in captured.err
    asked = ["--methods", "int4,kivi-2"]
    assert "divisor of 48" in fails(capsys, "memory", "--model", tmp_path, *asked, "--context", 64)
    assert main(["describe", "--head-dim", "48"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["int4"].split()[1] == f"{4 + 32 / 48:.2f}"
    assert "divisor of 48" in rows["kivi-2"]


def test_texts_that_do_not_serve(capsys, folder, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    options = ["--model", folder, "--methods", "int4", "--context", 64]
    run = lambda path: fails(capsys, "compare", *options, "--text", path)
    assert "no text" in run(empty)
    assert "UTF-8" in run(binary)
    assert "No such file" in run(tmp_path / "missing.txt")
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    assert "longer text" in run(short)
    assert "no text" in fails(capsys, "generate", "  ", "--model", folder)


def test_nothing_half_written(capsys, folder, text, tmp_path):
    out = tmp_path / "out"
    args = ["--model", folder, "--text", text, "--context", 10**6, "--out", out]
    fails(capsys, "compare", *args)
    assert not out.exists() or not list(out.iterdir())
    taken = tmp_path / "file"
    taken.write_text("")
    assert "--out" in fails(capsys, "compare", "--model", folder, "--text", text, "--out", taken)


def test_broken_checkpoints(capsys, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = next(p for p in broken.glob("*.safetensors") if name in load_file(p))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails(capsys, "generate", "abc", "--model", broken)
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a gguf file")
    fails(capsys, "generate", "abc", "--model", garbage)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    line = fails(capsys, "generate", "abc", "--model", broken, "--max-new", 4)
    assert "layer 1" in line
    assert "keys" in line
    assert "layer 1" in fails(
        capsys, "compare", "--model", broken, "--methods", "bf16", "--context", 32,
        "--text", Path(__file__), "--out", tmp_path / "nan",
    )  # fmt: skip
    assert not list((tmp_path / "nan").iterdir())
