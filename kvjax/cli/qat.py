"""`kvjax tune --qat`: a model's keys and values trained for the codec that will serve them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
import time

from kvjax.cli import options
from kvjax.core.errors import InputError
from kvjax.core.layout import Layout

LAYOUT = ("sink", "recent", "page")
_DEFAULTS = {
    "rank": 16,
    "rate": 2e-3,
    "anchor": 0.0,
    "context": 1024,
    "held_out": None,
    "save_model": None,
}


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training the model (--qat)")
    group.add_argument(
        "--qat",
        action="store_true",
        help="distil the full cache into W_K and W_V under the packed one; saved as it goes, so "
        "the same command goes on after a kill",
    )
    group.add_argument("--rank", type=int, help="of the changes of W_K and W_V (16)")
    group.add_argument("--rate", type=float, help="of Adam (0.002)")
    group.add_argument("--books", action="store_true", help="learn levels and means too")
    group.add_argument(
        "--anchor", type=float, help="weight of the KL with the full cache in the loss (0)"
    )
    group.add_argument("--context", type=int, help="tokens of a window, one per step (1024)")
    group.add_argument(
        "--held-out", metavar="FILE", help="another text: KL before and after, through real pages"
    )
    group.add_argument(
        "--save-model",
        metavar="FOLDER",
        help="also write the trained model there, a new folder for --model of all commands",
    )
    options.add_layout(parser)


def check_unused(args: argparse.Namespace) -> None:
    """Raises `InputError` for options of --qat without it."""
    given = [name for name in _DEFAULTS if getattr(args, name) is not None]
    given += ["books"] if args.books else []
    layout = options.layout_of(args)
    given += [name for name in LAYOUT if getattr(layout, name) != getattr(Layout(), name)]
    if given:
        raise InputError(
            "--" + given[0].replace("_", "-"),
            got="given without --qat",
            expected="it goes with --qat",
            fix="add --qat, or leave it out",
        )


def run(args: argparse.Namespace) -> int:
    from kvjax.calibrate.artefact import load_moments
    from kvjax.calibrate.names import check_name, get_for_model
    from kvjax.evals.stamp import make_stamp
    from kvjax.evals.text import model_windows, read_docstrings, read_text, same_text
    from kvjax.generate.plan import make_plan
    from kvjax.models.load import load
    from kvjax.models.save import check_new, save
    from kvjax.train import Training, adapt, train_saving

    for name, value in _DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    method = args.method or "turboquant-2"
    check_name(method, args.calibration)
    training = Training(
        steps=options.positive("--steps", 100 if args.steps is None else args.steps),
        rate=args.rate,
        rank=args.rank,
        books=args.books,
        anchor=args.anchor,
        seed=args.seed,
    )
    context = options.positive("--context", args.context)
    count = options.whole_windows(args.tokens, context)
    name, text = read_text(args.text) if args.text else read_docstrings()
    held_out = read_text(args.held_out) if args.held_out else None
    if held_out and same_text(name, held_out[0]):
        raise InputError(
            "--held-out",
            got=f"the text of the training, {name}",
            expected="another text",
            fix="test on a text that played no part",
        )
    if args.save_model is not None:
        if args.books:
            raise InputError(
                "--save-model",
                got="--books, whose levels are not in the model",
                expected="one of the two",
                fix="leave --books out, or load the adapter from --out with kvjax.train",
            )
        check_new(args.save_model)
    folder = options.out_folder(args.out or "runs/qat")
    options.use_compilation_cache()
    with options.progress() as report:
        report(f"loading {args.model}")
        model = load(args.model)
        moments = None
        if args.calibration is not None:
            moments, _ = load_moments(args.calibration, model.config, model.params)
        layout = options.layout_of(args)
        made = get_for_model(
            method, model.config, moments, layout=layout, seed=args.seed, params=model.params
        )
        plan = make_plan(model.config, made)
        windows = list(model_windows(model, text, context=context, windows=count))
        others = _held_out(model, held_out[1]) if held_out else None  # told before hours of work
        say = lambda message: print(message, file=sys.stderr)
        seconds: list[float] = []
        last, before = None, None
        for last in train_saving(plan, model.params, windows, training, folder / "state", say=say):
            now = time.monotonic()
            # Not the first: it restores or compiles.
            seconds += [] if before is None else [now - before]
            before, done = now, int(last.step)
            report(f"step {done} of {training.steps}, KL {float(last.losses[done - 1]):.4f}")
        assert last is not None
        if args.save_model is not None:
            save(
                dataclasses.replace(model, params=adapt(last.adapter, model.params)),
                args.save_model,
            )
        found = {} if others is None else _measure(model, plan, last.adapter, others, report)
    losses = last.losses.tolist()
    tenth = max(1, training.steps // 10)
    result = {
        "model": model.config.name,
        "method": method,
        "text": name,
        "held_out_text": held_out[0] if held_out else None,
        "first_loss": statistics.mean(losses[:tenth]),
        "last_loss": statistics.mean(losses[-tenth:]),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        **found,
        "stamp": make_stamp(seed=args.seed, command="kvjax " + shlex.join(sys.argv[1:])),
    }
    from kvjax.cli.compare import write_json

    write_json(folder / "qat.json", result | {"losses": losses})
    print(
        f"{result['model']}, {method}, {training.steps} steps: KL in the first tenth of "
        f"them {result['first_loss']:.4f}, in the last {result['last_loss']:.4f} (other windows)"
    )
    if found:
        kl, ppl = found["kl"], found["full_ppl"]
        print(
            f"held out ({held_out[0] if held_out else ''}), packed: KL {kl[0]:.4f} -> {kl[1]:.4f} "
            f"({kl[1] / kl[0] - 1:+.0%}) at {found['bits_per_value']:.2f} bits; full cache: "
            f"perplexity {ppl[0]:.3f} -> {ppl[1]:.3f} ({ppl[1] / ppl[0] - 1:+.2%})"
        )
    wrote = [folder / "qat.json", folder / "state", args.save_model]
    print("wrote " + ", ".join(str(path) for path in wrote if path))
    return 0


def _held_out(model, text: str):
    """Two windows of a text that plays no part in the training.

    Raises:
      InputError: a text too short for them.
    """
    from kvjax.evals.text import model_windows
    from kvjax.train.distill import PREDICTIONS

    context = min(2048, model.config.max_positions) // PREDICTIONS * PREDICTIONS
    try:
        return model_windows(model, text, context=context, windows=2)
    except InputError as error:
        raise InputError(
            "--held-out", got=error.got, expected=error.expected, fix="give a longer text"
        ) from None


def _measure(model, plan, adapter, windows, report) -> dict:
    """Before and after on a text that played no part: through real packed caches, and full ones."""
    import numpy as np

    from kvjax.evals.compare import Settings, quality, scoring_block, sizes
    from kvjax.evals.reference import reference_pass
    from kvjax.train import adapt, adapt_plan
    from kvjax.train.distill import mean_nll

    context = windows.shape[1]
    settings = Settings(methods=[], context=context, layout=plan.methods[0].layout)
    block = scoring_block({"": plan}, settings)
    report("held out: full cache")
    references = [reference_pass(model.params, model.config, tokens) for tokens in windows]
    changed = adapt(adapter, model.params)
    kl, nll = [], []
    for name, own, params in (
        ("before", plan, model.params),
        ("after", adapt_plan(adapter, plan), changed),
    ):
        report(f"held out: {name}")
        row, _, _ = quality(own, params, windows, references, block, context)
        kl.append((row["kl"], row["kl_se"]))
        nll.append([float(mean_nll(params, model.config, tokens)) for tokens in windows])
    config = dataclasses.asdict(settings.layout)
    return {
        "kl": [a for a, _ in kl],
        "kl_se": [b for _, b in kl],
        "full_ppl": [float(np.exp(np.mean(a))) for a in nll],
        "bits_per_value": sizes(plan, context)["bits_per_value"],
        "layout": config,
    }
