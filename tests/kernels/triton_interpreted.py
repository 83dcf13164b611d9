"""`packed_decode` as Triton source, run by Triton's interpreter on torch tensors in memory.

    TRITON_INTERPRET=1 python triton_interpreted.py NAME ...

Prints a line of JSON per case: its largest errors against softmax attention in float64. The
variable must be set before triton is imported: so this is a program of its own, for
`test_triton_source.py`.
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packs import attention, block, part

import kvjax
from kvjax.codecs import Codebook, Dropped, Normalized, Tiers, Uniform
from pallas_kernels.packed_decode import packed_decode, triton_backend
from pallas_kernels.packed_decode.config import Config

B, H, LAYERS = 2, 2, 2


def interpret(form, arrays, out_shape, config, compute_capability=None):
    """In place of `triton_backend.launch`."""
    del config, compute_capability
    host = functools.partial(on_host, dataclasses.replace(form, native=False), out_shape)
    return jax.pure_callback(host, out_shape, *arrays)


def on_host(form, out_shape, *arrays):
    import torch

    from pallas_kernels.packed_decode.triton_source import packed_decode_kernel

    def to_torch(a):
        a = np.asarray(a)
        if a.dtype == jnp.bfloat16:
            return torch.from_numpy(a.view(np.uint16).copy()).view(torch.bfloat16)
        return torch.from_numpy(a.copy())

    outs = [torch.full(s.shape, torch.nan, dtype=torch.float32) for s in out_shape]
    grid = out_shape[1].shape[:3]
    packed_decode_kernel[grid](*map(to_torch, arrays), *outs, FORM=form)
    return tuple(x.numpy() for x in outs)


def prepare():
    """Triton's interpreter, and all launches through it."""
    from triton.runtime import interpreter

    def patched(tensor, scope, plain=interpreter._patch_lang_tensor):
        """Triton 3.6 makes an int of an array of one number as numpy 2.4 no longer does."""
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    triton_backend.launch = interpret
    triton_backend.why_absent = lambda: None
    jax.config.update("jax_platforms", "cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """(bits, levels, scale) of each side, or tiers of them; and what is special."""

    key: tuple
    value: tuple
    page: int = 64
    slots: int = 3
    lengths: tuple = (192, 77)
    d: int = 32
    group: int = 3
    splits: int = 2
    tokens: int = 128
    passes: int = 1
    channels: int = 256
    table: bool = False
    window: bool = False
    flat_values: bool = False  # words of values not transposed


U2, LM2 = (2, False, "token"), (2, True, "token")
TIERS = ((8, 4, True), (16, 2, True))
CASES = {
    "uniform-2": Case(U2, U2),
    "lloyd-max-2": Case(LM2, LM2),
    "lloyd-max-3": Case((3, True, "token"), (3, True, "token"), page=128, slots=2, tokens=256),
    "lloyd-max-1": Case((1, True, "token"), (1, True, "token"), page=128, slots=2, tokens=256),
    "uniform-3": Case((3, False, "token"), (3, False, "none"), page=128, slots=2, tokens=256),
    "uniform-4": Case((4, False, "token"), (4, False, "token")),
    "lloyd-max-4": Case((4, True, "token"), (4, True, "none")),
    "uniform-8": Case((8, False, "token"), (8, False, "token")),
    "kivi": Case((2, False, "channel"), U2, page=128, slots=2),
    "kivi-8": Case((2, False, "channel"), (8, False, "token"), page=128, slots=2),
    "tiers": Case(("tiers", TIERS, "token"), ("tiers", TIERS, "token"), d=24),
    "bf16": Case((16, False, "none"), (16, False, "none")),
    "bf16-2": Case((16, False, "none"), LM2),
    "table": Case(U2, LM2, table=True),
    "table-one-page": Case(LM2, U2, table=True, page=128, slots=2, lengths=(256, 130)),
    "empty": Case(LM2, U2, lengths=(130, 0)),
    "all-masked": Case(U2, LM2, lengths=(0, 0)),
    "window": Case(LM2, U2, slots=4, lengths=(256, 128), window=True),
    "window-table": Case(U2, LM2, slots=4, lengths=(256, 128), window=True, table=True),
    "splits-3": Case(LM2, U2, slots=4, lengths=(250, 3), splits=3),
    "splits-7": Case(U2, U2, slots=4, lengths=(250, 3), splits=7),
    "passes": Case(LM2, U2, passes=2),
    "cuts": Case(LM2, U2, d=96, channels=32),
    "group-16": Case(LM2, LM2, group=16),
    "group-1": Case(LM2, LM2, group=1),
    "small-pages": Case((2, False, "channel"), U2, page=32, slots=5, lengths=(160, 45)),
    "odd-pages": Case(LM2, (8, False, "token"), page=96, slots=3, lengths=(288, 100)),
    "flat-values": Case(LM2, (3, True, "token"), page=128, slots=2, tokens=256, flat_values=True),
}


def side(rng, case, kind, transposed):
    lead = (LAYERS, 11, H) if case.table else (LAYERS, B, H, case.slots)
    bits, levels, scale = kind
    tiers = levels if bits == "tiers" else ((case.d, bits, levels),)
    made = [
        block(rng, lead, case.page, size, b, book, transposed and b < 16) for size, b, book in tiers
    ]
    packed, x = part(rng, lead, case.page, made, scale)
    return (packed,), x


def run(case):
    """Largest errors of out, over its largest number, and of lse."""
    rng = np.random.default_rng(0)
    key, k64 = side(rng, case, case.key, False)
    value, v64 = side(rng, case, case.value, not case.flat_values)
    q = jnp.asarray(rng.normal(size=(B, H, case.group, case.d)) * case.d**-0.5, jnp.float32)
    n, p = case.slots, case.page
    table = rng.permutation(11)[: B * n].reshape(B, n)
    flat = lambda x: (np.moveaxis(x[1][table], 2, 1) if case.table else x[1]).reshape(
        B, H, n * p, -1
    )
    lengths = np.array(case.lengths)
    seen = np.broadcast_to(np.arange(n * p) < lengths[:, None, None], (B, H, n * p))
    extra: dict[str, Any] = {"table": jnp.asarray(table)} if case.table else {}
    window = None
    if case.window:
        window = p + 6
        starts = np.array([[4 * p, 5 * p, 2 * p, 3 * p], [0, p, -1, -1]])
        position = np.array([6 * p - 3, p + 9])
        place = (starts[..., None] + np.arange(p)).reshape(B, 1, n * p)
        now = position[:, None, None]
        reach = (place <= now) & (now - place < window)
        seen = seen & reach & (np.repeat(starts, p, -1)[:, None] >= 0)
        kept = starts
        if case.table:
            kept = np.full(11, -1)
            kept[table] = starts
        kept = np.stack([np.full_like(kept, -1), kept])
        extra |= {"starts": jnp.asarray(kept), "position": jnp.asarray(position)}
    config = Config(
        splits=case.splits, tokens=case.tokens, passes=case.passes, channels=case.channels
    )
    out, lse = packed_decode(
        q,
        key,
        value,
        jnp.asarray(lengths),
        page=p,
        layer=1,
        window=window,
        config=config,
        backend="jax_triton",
        **extra,
    )
    out64, lse64 = attention(q, flat(k64), flat(v64), seen)
    scale = max(np.abs(out64).max(), 1e-30)
    return {
        "out": float(np.abs(out - out64).max() / scale) if seen.any() else float(np.abs(out).max()),
        "lse": float((np.abs(lse - lse64) / np.maximum(np.abs(lse64), 1)).max()),
    }


METHODS: dict[
    str, tuple[int, dict, dict[str, Any]]
] = {  # published recipes, through a whole cache: page, options of the layout and the cache
    "turboquant-2": (64, {}, {"window": 150}),
    "turboquant-prod-3": (128, {}, {}),
    "kivi-2": (32, {"pool": 11}, {}),
    "tiers": (64, {}, {}),
    "int4/bf16": (64, {}, {}),
}


def run_method(name):
    """Largest difference between the page scan and the kernel, over the largest output."""
    page, layout, options = METHODS[name]
    d, tokens, lead = 32, 2 + 3 * page + 70, (B, 2 + 3 * page + 70, H)
    if name == "tiers":  # of 4, 2 and 0 bits
        book = lambda bits: Codebook.lloyd_max(24, bits)
        kept = Normalized(Tiers((book(3), book(2)), (8, 16)))
        codec = Tiers((kept, Dropped()), (24, 8))
        value = Tiers((Tiers((Uniform(4), Uniform(2)), (8, 16)), Dropped()), (24, 8))
        method = kvjax.Method(codec, value)
    else:
        method = kvjax.methods.get(name, head_dim=d)
    method = method.with_layout(kvjax.Layout(sink=2, recent=page, page=page, **layout))
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(*lead, d)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(B, H, 3, d)), jnp.float32)
    cache = kvjax.init(method, capacity=tokens, kv_heads=H, head_dim=d, batch=B, **options)
    cache = jax.jit(lambda c: kvjax.prefill(method, c, k, v)[1])(cache)
    attend = jax.jit(lambda method, cache: kvjax.attend(method, cache, q))
    scan, kernel = (
        attend(method.with_attention(how), cache) for how in ("page_scan", "jax_triton")
    )
    assert float(jnp.abs(scan - kernel).max()) > 0  # it is another program
    return {"out": float(jnp.abs(scan - kernel).max() / jnp.abs(scan).max()), "lse": 0.0}


if __name__ == "__main__":
    prepare()
    for name in sys.argv[1:] or [*CASES, *(f"method {name}" for name in METHODS)]:
        _, _, method = name.rpartition("method ")
        row = run(CASES[name]) if name in CASES else run_method(method)
        print(json.dumps({"case": name, **row}), flush=True)
