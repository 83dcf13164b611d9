"""`kvjax memory --devices`: a table and JSON of the same plan, and mistakes in one line."""

import json

from kvjax.cli.main import main
from kvjax.evals.devices import get_device
from kvjax.evals.planner import plan_layouts, why
from kvjax.methods import get
from kvjax.models.config import known_configs

ARGV = ["memory", "--devices", "4", "--batch", "2", "--methods", "bf16,int2"]


def call(capsys, *argv):
    assert main([*ARGV, *argv]) == 0
    return capsys.readouterr().out


def fails(capsys, *argv):
    assert main(["memory", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_table_and_json_are_the_plan(capsys):
    model = ["--model", "smollm2-135m", "--device", "a100-80", "--context", "4096"]
    data = json.loads(call(capsys, *model, "--json"))
    table = call(capsys, *model)
    assert not data["beyond_positions"]
    assert "beyond its" not in table
    assert "a roofline, not measured" in table
    config, device = known_configs()["smollm2-135m"], get_device("a100-80")
    for name, found in zip(("bf16", "int2"), data["methods"], strict=True):
        rows = plan_layouts(config, get(name, 64), device, 4, context=4096, batch=2)
        assert found["method"] == name
        assert found["why"] == why(rows)
        assert [row["cache"] for row in found["layouts"]] == [row.cache for row in rows]
        best = rows[0]
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1:5] == [
            best.mesh,
            f"{best.weights / 2**30:.2f}",
            f"{best.cache / 2**30:.2f}",
            "yes",
        ]
        assert line.endswith(why(rows))


def test_contexts_beyond_the_positions_are_told(capsys):
    argv = ["--model", "smollm2-135m", "--context", "1048576"]
    assert "beyond its 8,192 positions" in call(capsys, *argv)
    assert json.loads(call(capsys, *argv, "--json"))["beyond_positions"]


def test_mistakes_end_in_one_line(capsys):
    assert "tpu-v5e" in fails(capsys, "--devices", "8", "--device", "b200")
    assert "add --devices" in fails(capsys, "--device", "h200")
    assert "--devices" in fails(capsys, "--devices", "0")
    assert "--batch" in fails(capsys, "--devices", "8", "--batch", "0")
    assert "positions" in fails(capsys, "--methods", "int4", "--context", "1048576")  # no plan
