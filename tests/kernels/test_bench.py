"""`python -m pallas_kernels.bench`: the whole command in its tiny form, and what it must not do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.arg_specs import spec
from pallas_kernels.bench import attention, baselines, check, sweep, timing
from pallas_kernels.bench.cases import CASES
from pallas_kernels.bench.cases import TINY as TINY_CASES
from pallas_kernels.bench.command import PARTS, main
from pallas_kernels.bench.results import Problem, Results, table
from pallas_kernels.bench.setting import matching
from pallas_kernels.packed_decode import packed_decode_reference, tuned

TINY = ["--tiny", "--device", "gpu"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The file of a tiny run of the attention part."""
    out = tmp_path_factory.mktemp("bench") / "deep" / "rows.json"
    assert main([*TINY, "--part", "attention", "--out", str(out)]) == 0
    return out


def test_a_tiny_run_ends_in_a_labelled_file(ran):
    kept = json.loads(ran.read_text())
    [run] = kept["runs"]
    assert run["note"] == "interpret: not a measurement"
    assert {"device", "date", "commit", "jax", "command"} <= set(run)
    rows = {row["id"].rsplit("/", 1)[1]: row for row in kept["rows"]}
    assert list(rows) == ["xla-f32", "xla-bf16", "cudnn-bf16", "torch-bf16", "bf16", "lloyd-max-2"]
    assert rows["cudnn-bf16"]["skipped"] == "cuDNN needs a GPU"
    packed, dense = rows["lloyd-max-2"], rows["xla-bf16"]
    assert packed["bits"] == 2.5  # 2 bits, and 16 of norm over 32 channels
    assert dense["MB"] == pytest.approx(2 * 2 * 128 * 32 * 2 / 1e6)
    assert packed["x_xla_bf16"] == pytest.approx(dense["us"] / packed["us"])
    assert packed["us_low"] <= packed["us"] <= packed["us_high"]
    assert 0 < packed["error"] < 4e-3


def test_finished_rows_are_kept_and_not_measured_again(ran, monkeypatch, capsys):
    def measure(wanted, setting):
        raise AssertionError(wanted)

    monkeypatch.setattr(attention, "measure", measure)
    before = json.loads(ran.read_text())["rows"]
    command = [*TINY, "--part", "attention", "--only", "lloyd", "--out", str(ran)]
    assert main(command) == 0
    assert "kept from before" in capsys.readouterr().out
    assert json.loads(ran.read_text())["rows"] == before


def test_rows_that_were_left_out_are_tried_again(ran, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "measure", lambda wanted, setting: asked.append(wanted) or [])
    main([*TINY, "--part", "attention", "--out", str(ran)])
    assert asked == [[f"attention/b2/t128/d32/{x}-bf16" for x in ("cudnn", "torch")]]


def test_a_tiny_sweep_is_written_down_only_with_tune(tmp_path, monkeypatch, capsys):
    """With a race that the most splits win: inputs and choices are real, times are not."""

    def race(programs, *, rounds):
        return {c: timing.Seconds(1e-6 / c[1].splits, 0, 0, rounds) for c in programs}

    monkeypatch.setattr(sweep, "packed_program", lambda spec, *_: (None, {}))
    monkeypatch.setattr(sweep.timing, "race", race)
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    assert main([*TINY, "--part", "sweep"]) == 0
    assert not (tmp_path / "tuned").exists()
    assert main([*TINY, "--part", "sweep", "--tune"]) == 0
    [entry] = json.loads((tmp_path / "tuned" / "cpu.json").read_text())["entries"]
    assert entry["key"] == entry["value"] == [[[2, True]]]
    assert entry["shape"]["tokens"] == 128
    assert entry["config"]["splits"] == 2 * sweep._default(TINY_CASES[0].spec("lloyd-max-2")).splits
    assert entry["us_default"] == pytest.approx(2 * entry["us"])
    assert "x_default" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "nothing-like-it"], "'nothing-like-it'"),
        (["--part", "speed"], "some of attention, sweep"),
        (["--rounds", "0"], "1 or more"),
        (["--faster"], "--faster"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_status_2(words, says, capsys):
    assert main([*TINY, *words]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert not out


def test_no_gpu_is_said_in_one_line(capsys):
    assert main(["--device", "gpu"]) == 2
    assert "expected a GPU" in capsys.readouterr().err


def test_files_that_cannot_hold_the_rows(ran, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"rows": 3}')
    for path, says in ((tmp_path, "can be written"), (other, "something else")):
        assert main([*TINY, "--part", "attention", "--out", str(path)]) == 2
        assert says in capsys.readouterr().err
    assert other.read_text() == '{"rows": 3}'
    with pytest.raises(Problem, match=r"rows of cpu, interpret.*; expected rows of H200"):
        Results(ran, {"device": "H200", "note": ""})


def test_wrong_numbers_are_refused_not_measured(monkeypatch, capsys):
    def wrong(*args, page, window, backend, **kwargs):
        out, lse = packed_decode_reference(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(check, "packed_decode", wrong)
    monkeypatch.setattr(attention, "packed_program", None)
    assert main([*TINY, "--part", "attention", "--only", "lloyd"]) == 1
    out = capsys.readouterr().out
    assert "lloyd-max-2  left out: WRONG NUMBERS: error 0.01 against float64" in out


@pytest.mark.parametrize("paged", [False, True])
def test_the_check_passes_the_reference_alone(paged, monkeypatch):
    """The two things that kernels are held against agree, and logits spread as they should."""
    small = spec(
        "turboquant-prod-3", batch=2, kv_heads=1, tokens=96, page=32, head_dim=32, paged=paged
    )
    strip = lambda *args, page, window, backend, **kwargs: packed_decode_reference(*args, **kwargs)
    monkeypatch.setattr(check, "packed_decode", strip)
    verdict = check.check(small, "interpret")
    assert verdict.reason is None
    assert max(verdict.errors.values()) < 1e-5
    args = small.arrays(np.random.default_rng(0))
    args["q"] = args["q"] * check.sharpness(args["q"], args["key"])
    out, _ = packed_decode_reference(**args)
    assert check.check_last(small, args, out).errors["the reference"] < 1e-5
    assert check.check_last(small, args, out.at[-1].add(1)).reason
    assert check.check_last(small, args, out.at[-1, 0, 0, 0].set(jnp.nan)).reason
    plain = packed_decode_reference(**{**args, "q": args["q"] * 0})[0]
    assert jnp.abs(out - plain).max() > 0.05 * jnp.abs(plain).max()  # keys matter


def test_attention_of_xla_is_softmax_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 3, n, 8)) for n in (4, 16, 16))
    p = np.exp(np.einsum("bhgd,bhtd->bhgt", q, k))
    right = np.einsum("bhgt,bhtd->bhgd", p / p.sum(-1, keepdims=True), v)
    got = baselines.xla(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_loops_call_as_often_as_they_say_and_rotate():
    seen = []

    def step(q, arrays, i):
        jax.debug.callback(lambda i: seen.append(int(i)), i % arrays.shape[0], ordered=True)
        return q + arrays[i % arrays.shape[0]]

    q, arrays = jnp.ones(4), jnp.arange(3.0)[:, None] * jnp.ones(4)
    loop = timing.program(step, q, arrays, times=6, size=16)
    assert loop.times == 6
    np.testing.assert_array_equal(loop.run(), 3.0)  # of the last copy, for the very same query
    jax.effects_barrier()
    assert seen == [0, 1, 2] * 2
    copies = [(a,) for a in arrays]
    loop = timing.unrolled(lambda q, a: q + a, q, copies, times=7, size=16)
    assert loop.times == 6
    np.testing.assert_array_equal(loop.run(), 3.0)


def test_rounds_take_turns_and_medians_are_per_call(monkeypatch):
    order, clock = [], [0.0]
    takes = {"a": iter([9, 2, 4, 30]), "b": iter([9, 10, 10, 10])}

    def program(name):
        def run():
            order.append(name)
            clock[0] += next(takes[name])

        return timing.Program(run, 2, 1)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    times = timing.race({name: program(name) for name in takes}, rounds=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert times["a"] == timing.Seconds(2.0, 1.5, 8.5, 3)  # of 2, 4 and 30 for two calls
    assert times["b"].median == 5.0


def test_loops_are_long_and_turn_over_more_than_the_cache():
    assert timing.copies_of(10**9) == 1
    assert timing.copies_of(25_000_000) == 10
    assert timing.turns(10**9, 1, seconds=0.01, bandwidth=4e12) == 40
    assert timing.turns(1000, 7, seconds=0.01, bandwidth=4e12) % 7 == 0
    assert timing.turns(1000, 2, seconds=0.0, bandwidth=4e12) == 2


def test_tuned_entries_replace_those_of_the_same_launch(tmp_path):
    stamp = {"device": "NVIDIA H200", "date": "d", "commit": "c", "jax": "j"}
    entry = lambda tokens, us: {"key": [], "value": [], "shape": {"tokens": tokens}, "us": us}
    for tokens, us in ((8, 3.0), (16, 4.0), (8, 2.0)):
        sweep.write_tuned(entry(tokens, us), stamp, tmp_path)
    kept = json.loads(tuned.tuned_file("NVIDIA H200", tmp_path).read_text())["entries"]
    assert [(e["shape"]["tokens"], e["us"], e["commit"]) for e in kept] == [
        (16, 4.0, "c"),
        (8, 2.0, "c"),
    ]


def test_the_shapes_that_are_promised_are_there():
    plain = {(c.batch, c.tokens) for c in CASES if c.head_dim == 128}
    assert plain == {(b, t) for b in (1, 8, 32) for t in (8192, 32768, 131072)}
    assert {c.head_dim for c in CASES} == {64, 128, 256}
    assert all((c.kv_heads, c.group) == (8, 4) for c in CASES)
    names = [unit for case in CASES for unit in case.units]
    assert len(names) == len(set(names))
    assert matching(names, "b1/t8192/d128/bf16") == ["attention/b1/t8192/d128/bf16"]
    assert set(PARTS) == {"gpu", "cpu"}


def test_numbers_of_all_sizes_fit_the_table():
    shown = table([{"id": "a", "us": 0.01234}, {"id": "b", "us": 123456.7, "met": None}])
    assert shown.splitlines() == ["id  us      met", "a   0.0123", "b   123457"]
