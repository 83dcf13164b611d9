"""Every file of a checkpoint, cut short, one bit other, or gone: refused, and named."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.checkpoint import peek, restore, save
from kvjax.core.errors import InputError


def state(seed):
    rng = np.random.default_rng(seed)
    return {
        "large": jnp.asarray(rng.integers(0, 2**16, (64, 4096), np.uint16)),
        "small": jnp.asarray(rng.normal(size=7), jnp.float32),
        "host": rng.normal(size=(3, 2)),
        "n": seed,
    }


def flip(path: Path, at: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


DAMAGES = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "first bit": lambda path: flip(path, 0.0, 0),
    "some bit": lambda path: flip(path, 0.37, 5),
    "last bit": lambda path: flip(path, 1.0, 7),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("state")
    for seed in (0, 1):
        at = save(root, state(seed))
    files = sorted(path for path in at.rglob("*") if path.is_file())
    assert len(files) > 8
    return root, files


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_file(saved, damage):
    root, files = saved
    for path in files:
        whole = path.read_bytes()
        DAMAGES[damage](path)
        with pytest.raises(InputError, match="cannot be read") as error:
            restore(root, state(9))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert restore(root, state(9), number=1)[0]["n"] == 0  # the one before is as it was
        path.write_bytes(whole)
    back = restore(root, state(9))[0]
    assert back["n"] == 1
    np.testing.assert_array_equal(back["large"], state(1)["large"])


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("gone",)])
def test_the_pointer(saved, damage):
    """Damage to it is found, or is none; without it there is nothing."""
    root, _ = saved
    path = root / "current"
    whole = path.read_bytes()
    DAMAGES[damage](path)
    try:
        assert restore(root, state(9))[0]["n"] == 1
    except InputError as error:
        assert "cannot be read" in str(error)  # noqa: PT017
        assert "current" in str(error) or "state.json" in str(error)  # noqa: PT017
    else:
        assert damage in ("a byte less", "half", "last bit", "a byte more")
    path.unlink()
    assert restore(root, state(9)) is None
    assert peek(root) is None
    path.write_bytes(whole)


def test_a_file_more_does_no_harm(saved):
    root, files = saved
    extra = files[0].parent / "note.txt"
    extra.write_text("mine")
    assert restore(root, state(9))[0]["n"] == 1
    extra.unlink()
