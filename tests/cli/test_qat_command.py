"""`kvjax tune --qat` on a tiny model."""

import json

from memory_model import tiny_model

from kvjax.cli.main import main


def test_training_for_a_method(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("It was a quiet night by the harbour, and nobody spoke of ships. " * 60)
    command = ["tune", "--qat", "--model", str(model), "--method", "int3"]
    command += ["--text", str(text), "--tokens", "512", "--context", "128", "--steps", "4"]
    command += ["--page", "16", "--recent", "16", "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(command) == 0
    told = capsys.readouterr()
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
