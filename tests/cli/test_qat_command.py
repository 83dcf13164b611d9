"""`kvjax tune --qat` on a tiny model."""

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
    assert "int3, 4 steps: KL of the text trained on" in told.out
    assert "4 of 4 steps are there" in told.err
    assert main([*command, "--held-out", str(text)]) == 2
    assert "text of the training" in capsys.readouterr().err
    assert main(["tune", "--rank", "3"]) == 2
    assert "--rank: got given without --qat" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "--calibration: got none" in capsys.readouterr().err
