"""How close does each code come to the rate-distortion bound, and on which vectors?

Question: error, bias, true bits and decibels above the bound, for every published method and ours,
          on vectors of the unit sphere, heavy-tailed ones, ones with outlier channels, and keys and
          values of real models.
Command:  python experiments/distortion.py --config=configs/distortion.py
          (a tiny run, half a minute: --config=configs/distortion.py:tiny)
Cost:     about 25 minutes on two CPU cores; the trellis codes are half of it.
Expected: on the sphere at d = 128, gap in dB at 2 bits of code: trellis 1.2, e8 2.3, turboquant
          3.4, turboquant-prod 10; the same order on real keys. See docs/results-log.md.

Writes config.json, metrics.json (rows of `kvjax.evals.distortion.Row`) and gap.png.
"""

from __future__ import annotations

from pathlib import Path

from absl import app
from ml_collections import config_flags

from kvjax.cli.compare import write_json
from kvjax.evals.distortion_run import Settings, run_distortion, write

_CONFIG = config_flags.DEFINE_config_file("config")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value.to_dict()
    folder = Path(config.pop("out"))
    folder.mkdir(parents=True, exist_ok=True)
    result = run_distortion(Settings(**config), progress=print)
    write_json(folder / "config.json", config)
    command = "python experiments/distortion.py --config=configs/distortion.py"
    write(result, folder, command=command, seed=config["seed"])


if __name__ == "__main__":
    app.run(main)
