"""`kvjax mla`: a Llama as a model with latent attention, and what that costs."""

from __future__ import annotations

import argparse

from kvjax.cli import options
from kvjax.core.errors import InputError


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "mla",
        help="convert a Llama to multi-head latent attention",
        description="Converts grouped-query attention to one latent per token (TransMLA, arXiv "
        "2502.07864; nothing is trained), measures the converted model beside the original on text "
        "that played no part, and writes it as a folder for --model of the other commands.",
    )
    options.add_model(parser)
    parser.add_argument("--text", help="calibration text, UTF-8 (default: ships with Python)")
    parser.add_argument("--rank", type=int, required=True, help="numbers of the latent")
    parser.add_argument(
        "--rope-heads", type=int, required=True, help="rotary heads that stay; all KV heads: exact"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (%(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="to calibrate on (%(default)s)")
    parser.add_argument("--out", required=True, help="a new folder for the model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import jax.numpy as jnp

    from kvjax.evals.text import model_windows, read_text
    from kvjax.models.load import load
    from kvjax.models.save import check_new, save
    from kvjax.models.to_mla import check, divergence, joint_moments, to_mla

    check_new(args.out)  # told before anything is loaded
    sizes = {
        name: options.positive(f"--{name}", getattr(args, name)) for name in ("context", "windows")
    }
    _, text = read_text(args.text)
    options.use_compilation_cache()
    with options.progress(sizes["windows"] + 3) as report:
        report(f"loading {args.model}")
        model = load(args.model)
        check(model.config, args.rank, args.rope_heads)
        *seen, held_out = model_windows(
            model, text, context=sizes["context"], windows=sizes["windows"] + 1
        )
        total = jnp.zeros(())
        for i, tokens in enumerate(seen):
            report(f"keys and values, window {i + 1} of {len(seen)}")
            total = total + joint_moments(model.params, model.config, jnp.asarray(tokens)[None])
        report("converting")
        made = to_mla(model, total / len(seen), rank=args.rank, rope_heads=args.rope_heads)
        report("measuring")
        kl = divergence(model.params, model.config, made.params, made.config, jnp.asarray(held_out))
        if not bool(jnp.isfinite(kl).all()):
            raise InputError(
                "converted model", got="NaN", expected="finite logits", fix="use float32 weights"
            )
        path = save(made, args.out)
    before, after = (int(m.config.kv_bytes_per_token()) for m in (model, made))
    print(
        f"{model.config.name}: {before} -> {after} bytes per token (bf16), "
        f"KL {float(kl.mean()):.4g} nats on {len(held_out)} tokens not calibrated on"
    )
    print(f"wrote {path}")
    return 0
