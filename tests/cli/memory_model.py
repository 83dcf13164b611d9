"""A tiny checkpoint with a tokenizer of letters, for the commands that keep a memory."""

import json
import shutil
from pathlib import Path

from tokenizers import decoders

from kvjax.models.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "models" / "tiny" / "llama"
SMALL = ["--sink", "4", "--recent", "16", "--page", "16", "--budget", "96", "--block", "64"]
OWN = ["--embedder", "model"]


def tiny_model(folder: Path) -> Path:
    """The checkpoint in a new folder: 2048 positions, one token per letter, no end token."""
    shutil.copytree(TINY, folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            config |= {"max_position_embeddings": 2048} if name == "config.json" else {}
            config.pop("eos_token_id", None)
            (folder / name).write_text(json.dumps(config))
    backend = Tokenizer.of_letters(96).backend
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def fails(main, capsys, *argv) -> str:
    """Runs a command that must fail: status 2 and one line on stderr, which it returns."""
    assert main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    (line,) = [x for x in lines if x.startswith("kvjax: ")]
    assert "got" in line
    assert "expected" in line
    return line
