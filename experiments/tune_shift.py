"""Can perplexity alone tell what a model was tuned for, and hand it on to another model?

Question: TuneShift-KD (arXiv 2603.24518) on a pair made here: a base model, the same model tuned on
          an invented harbour, and a third model of another family that is to know it too.
Command:  python experiments/tune_shift.py --config=configs/tune_shift.py
          (tiny, with random weights: --config=configs/tune_shift.py:tiny)
Cost:     about 20 minutes on two CPU cores, most of it two fits of low-rank changes.
Expected: selection precision 0.89, recall 0.97 on questions asked in ways that were not trained
          on; the third model's perplexity of the true answers from 204 to 40, nearly all of it
          from the eight seeds: of 31 prompts that the tuned model wrote one was of the domain.

1. Fits low-rank changes of the base model to questions about the harbour: the tuned model. Among
   them are general questions with the base's own answers: without these the tuned model speaks of
   berths whatever it is asked, which surprises the base as much as what it was tuned for.
2. Lets the tuned model answer questions about the harbour, asked in ways that it was not trained
   on, and general ones; those whose answers surprise the base model `threshold` times as much as
   the tuned one are called special; the threshold comes from a few seeds. Precision and recall
   against what they are.
3. From a few seeds the tuned model writes more special prompts (`kvjax.train.expand`).
4. Fits the third model to these prompts and the tuned model's answers; no fact of the domain is
   taken from anywhere else. Its perplexity on the true answers, before and after.

Writes config.json, stamp.json, metrics.json and prompts.jsonl into `config.out`.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import app
from ml_collections import config_flags
from tune_shift_run import run

from kvjax.cli.compare import write_json
from kvjax.evals.stamp import make_stamp

_CONFIG = config_flags.DEFINE_config_file("config")


def main(argv: list[str]) -> None:
    del argv
    config = _CONFIG.value
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    found = run(config)
    stamp = make_stamp(seed=config.seed, command="python experiments/tune_shift.py")
    prompts = found.pop("prompts")
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "stamp.json", stamp)
    write_json(folder / "metrics.json", {**found, "stamp": stamp})
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    chosen, more, target = found["selection"], found["expansion"], found["target"]
    print(
        f"selection: precision {chosen['precision']:.2f}, recall {chosen['recall']:.2f} of "
        f"{chosen['special']}; {more['prompts']} prompts, {more['of_the_domain']} of the domain; "
        f"{config.target}: perplexity of true answers {target['before']:.1f} -> "
        f"{target['after']:.1f}"
    )
    print(f"wrote {folder / 'metrics.json'}, {folder / 'prompts.jsonl'}")


if __name__ == "__main__":
    app.run(main)
