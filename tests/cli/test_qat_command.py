"""`kvjax tune --qat` on a tiny model."""

import json

from memory_model import tiny_model

from kvjax.cli.main import main
from kvjax.models.load import load


def test_training_for_a_method(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("It was a quiet night by the harbour, and nobody spoke of ships. " * 60)
    command = ["tune", "--qat", "--model", str(model), "--method", "int3"]
    command += ["--text", str(text), "--tokens", "512", "--context", "128", "--steps", "4"]
    command += ["--page", "16", "--recent", "16", "--out", str(tmp_path / "out")]
    trained = tmp_path / "trained"
    assert main(command) == 0
    assert main([*command, "--save-model", str(trained)]) == 0
    told = capsys.readouterr()
    before, after = load(model, dtype="float32"), load(trained, dtype="float32")
    apart = lambda leaf: float(abs(getattr(after.params.runs[0], leaf) - before_of(leaf)).max())
    before_of = lambda leaf: getattr(before.params.runs[0], leaf)
    assert apart("wk") > 1e-4 < apart("wv")
    assert apart("wq") == apart("w_up") == 0
    assert main([*command, "--save-model", str(trained)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main([*command, "--save-model", str(tmp_path / "new"), "--books"]) == 2
    assert "--save-model: got --books" in capsys.readouterr().err
    assert main(["tune", "--save-model", "x"]) == 2
    assert "--save-model: got given without --qat" in capsys.readouterr().err
    assert "int3, 4 steps: KL in the first tenth of them" in told.out
    assert "4 of 4 steps are there" in told.err
    found = json.loads((tmp_path / "out" / "qat.json").read_text())
    assert found["seconds_per_step"] is None  # the second run has made no step
    assert main([*command, "--held-out", str(text)]) == 2
    assert "text of the training" in capsys.readouterr().err
    # What is too short is told before anything is trained.
    short, late = tmp_path / "short.txt", str(tmp_path / "late")
    short.write_text("It is short. " * 20)
    assert main([*command[:-1], late, "--held-out", str(short)]) == 2
    assert "--held-out: got 260 tokens; expected 4096" in capsys.readouterr().err
    assert not (tmp_path / "late" / "state").exists()
    assert main([*command[:-1], late, "--seed", "-1"]) == 2
    assert "seed: got -1" in capsys.readouterr().err
    assert main(["tune", "--page", "16", "--recent", "16"]) == 2
    assert "--recent: got given without --qat" in capsys.readouterr().err
    assert main(["tune", "--rank", "3"]) == 2
    assert "--rank: got given without --qat" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "--calibration: got none" in capsys.readouterr().err
