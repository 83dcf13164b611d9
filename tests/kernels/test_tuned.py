"""Which measured tuning a launch takes, and that what it takes reaches the kernel."""

import dataclasses
import json

import pytest

from pallas_kernels.arg_specs import spec
from pallas_kernels.packed_decode import kernel, tuned
from pallas_kernels.packed_decode.config import Config, heuristic
from pallas_kernels.packed_decode.tuned import choose, signature, tuned_file

DEVICE = "NVIDIA H200"
ARGS = spec("lloyd-max-2", tokens=512, page=256).shapes()
SIDES = ARGS["key"], ARGS["value"]


def entry(batch=1, tokens=131072, page=256, group=4, name="lloyd-max-2", **config):
    args = spec(name, tokens=512, page=256).shapes()
    shape = {"batch": batch, "kv_heads": 8, "group": group, "head_dim": 128, "tokens": tokens}
    return {
        "key": signature(args["key"]),
        "value": signature(args["value"]),
        "shape": shape,
        "page": page,
        "config": dataclasses.asdict(dataclasses.replace(Config(), **config)),
    }


def write(folder, *entries):
    tuned_file(DEVICE, folder).write_text(json.dumps({"device": DEVICE, "entries": entries}))


def chosen(folder, batch=1, tokens=131072, page=256, group=4, head_dim=128, device=DEVICE):
    sizes = (batch, 8, group, head_dim, tokens // page, page)
    return choose(*sizes, *SIDES, device=device, folder=folder)


def test_the_measured_launch_is_taken_as_it_was(tmp_path):
    write(tmp_path, entry(splits=40, warps=4), entry(batch=8, tokens=32768, splits=7, stages=3))
    assert chosen(tmp_path) == Config(splits=40, warps=4)
    assert chosen(tmp_path, batch=8, tokens=32768) == Config(splits=7, stages=3)


def test_others_take_the_nearest_with_splits_of_their_own(tmp_path):
    write(tmp_path, entry(splits=66, warps=4), entry(batch=8, tokens=32768, splits=7, stages=3))
    # A wave of 4 warps: 132 * 8 / 4 programs over 8 heads are 33; tuning doubled it.
    assert chosen(tmp_path, tokens=65536) == Config(splits=66, warps=4)
    assert chosen(tmp_path, batch=2) == Config(splits=32, warps=4)
    assert chosen(tmp_path, tokens=4096).splits == 16  # no more than steps
    assert chosen(tmp_path, batch=16, tokens=16384).stages == 3


def test_nothing_that_fits_is_the_heuristic(tmp_path):
    usual = heuristic(1, 8, 512, 256, unit_bits=2)
    assert chosen(tmp_path) == usual  # no file
    write(tmp_path, entry(splits=40, name="uniform-2"), entry(page=64), entry(group=8))
    assert chosen(tmp_path) == usual
    assert chosen(tmp_path, device="NVIDIA H100") == usual
    write(tmp_path, entry(splits=40))
    assert chosen(tmp_path, head_dim=64) == usual


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": [{}]}', '{"entries": [{"page": 256, "shape": {}}]}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    tuned_file(DEVICE, tmp_path).write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-h200.json .*; expected .*; delete it"):
        chosen(tmp_path)


def test_no_sizes_of_nothing(tmp_path):
    write(tmp_path, entry(warps=0))
    with pytest.raises(ValueError, match="without its sizes"):
        chosen(tmp_path)


def test_the_kernel_asks(tmp_path, monkeypatch):
    """On a GPU only, and only where no tuning was given."""
    import jax

    asked = []

    class Stop(Exception):
        pass

    def call(body, args, *, warps, **rest):
        asked.append(warps)
        raise Stop

    monkeypatch.setattr(kernel, "call", call)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    kind = jax.devices()[0].device_kind
    small = spec("lloyd-max-2", tokens=512, page=256)
    path = tuned_file(kind, tmp_path)
    sizes = {"batch": small.batch, "kv_heads": small.kv_heads, "group": small.group}
    made = {**entry(warps=8), "shape": {**entry()["shape"], **sizes}}
    path.write_text(json.dumps({"device": kind, "entries": [made]}))
    for backend, config in (("triton", None), ("interpret", None), ("triton", Config(warps=1))):
        with pytest.raises(Stop):
            jax.eval_shape(
                lambda args, b=backend, c=config: kernel.packed_decode(
                    **args, page=256, backend=b, config=c
                ),
                small.shapes(),
            )
    assert asked == [8, 2, 1]
