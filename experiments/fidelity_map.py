"""Which method wins at which rate, on a real model?

Question: KL to the full cache against true bits per value, for the published recipes.
Command:  python experiments/fidelity_map.py --config=configs/fidelity_map.py --text=FILE
          (a tiny run, one minute: --config=configs/fidelity_map.py:tiny)
Cost:     about 25 s per method and window of 2048 tokens on two CPU cores.
Expected: near a fake-quantized study with other texts (SmolLM2-135M, windows 4 / 64): turboquant-2
          0.09, turboquant-3 0.018, kivi-2 0.09, hadamard-int2 0.5, int2 1.8. Only the tiny variant
          has been run with this program so far.

Writes config.json, stamp.json, metrics.json, metrics.jsonl (a line per method), pareto.png and
report.html into `config.out`.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

import kvjax
from kvjax.cli.compare import write_json
from kvjax.evals.compare import Settings, compare
from kvjax.evals.report import write_report
from kvjax.evals.stamp import make_stamp
from kvjax.evals.table import print_table
from kvjax.evals.text import read_text
from kvjax.models.load import load

_CONFIG = config_flags.DEFINE_config_file("config")
_TEXT = flags.DEFINE_string(
    "text", None, "A UTF-8 text file; default: prose that ships with Python."
)


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    name, text = read_text(_TEXT.value)
    model = load(config.model)
    settings = Settings(
        methods=tuple(config.methods),
        context=config.context,
        windows=config.windows,
        layout=kvjax.Layout(**config.layout.to_dict()),
        seed=config.seed,
        rounds=config.rounds,
    )
    result = compare(model, text, settings, progress=print)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = make_stamp(seed=config.seed, command="python experiments/fidelity_map.py")
    metrics = {"model": model.config.name, "text": name, **result, "stamp": stamp}
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "stamp.json", stamp)
    write_json(folder / "metrics.json", metrics)
    lines = "".join(json.dumps(row) + "\n" for row in metrics["rows"])
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    write_report(metrics, folder)
    print_table(metrics)


if __name__ == "__main__":
    app.run(main)
