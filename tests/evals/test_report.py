import base64
import html
import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from kvjax.core.errors import InputError
from kvjax.evals.families import FAMILIES, family
from kvjax.evals.report import summary, write_report
from kvjax.evals.table import (
    COLUMNS,
    exact,
    front_rows,
    kl_text,
    one_line,
    pareto_front,
    print_table,
    small,
)

# method, bits, total bits, ppl, KL, its s.e., top-1, logit dB, attention error, tokens/s, x bf16
INVENTED = """
bf16                      16.00 16.00 14.21 3.1e-6 4e-7  0.9993 -52.1 0.0021 71.2 1.00
int8                       8.50  8.79 14.21 0.00009 7e-6 0.9941 -44.9 0.0061 80.4 1.13
int4                       4.50  4.94 14.96 0.0521 0.0031 0.902 -17.8 0.1130 95.1 1.34
int3                       3.50  3.98 19.02 0.3012 0.0142 0.771 -10.4 0.2510 90.3 1.27
int2                       2.50  3.02 88.10 1.8420 0.0401 0.402  -3.0 0.6420 99.7 1.40
hadamard-int4              4.50  4.94 14.38 0.0112 0.0007 0.957 -21.5 0.0702 88.8 1.25
hadamard-int3              3.50  3.98 15.10 0.0590 0.0029 0.897 -15.2 0.1401 84.0 1.18
hadamard-int2              2.50  3.02 22.90 0.4650 0.0181 0.712  -8.1 0.3120 92.2 1.29
kivi-2                     3.00  3.50 15.42 0.0792 0.0036 0.880 -12.1 0.1720 90.1 1.27
kivi-4                     5.00  5.42 14.25 0.0031 0.0002 0.978 -25.0 0.0430 86.2 1.21
turboquant-1               1.25  1.82 31.70 0.7820 0.0252 0.610  -4.9 0.4360 70.0 0.98
turboquant-2               2.25  2.78 16.02 0.1190 0.0052 0.852 -10.0 0.2080 82.5 1.16
turboquant-2.5             2.75  3.26 15.31 0.0721 0.0034 0.884 -12.6 0.1660 60.4 0.85
turboquant-3               3.25  3.74 14.62 0.0268 0.0015 0.931 -16.1 0.1130 78.9 1.11
turboquant-3.5             3.75  4.22 14.44 0.0151 0.0009 0.948 -18.6 0.0880 58.1 0.82
turboquant-4               4.25  4.70 14.31 0.0068 0.0004 0.966 -21.9 0.0601 81.7 1.15
turboquant-prod-3          3.50  3.98 14.97 0.0481 0.0026 0.906 -13.9 0.1460 51.0 0.72
turboquant-prod-4          4.50  4.94 14.42 0.0137 0.0008 0.951 -19.0 0.0852 50.2 0.71
qjl                        3.10  3.60 17.81 0.2210 0.0101 0.802  -9.3 0.2900 44.4 0.62
kivi-2/turboquant-3        3.12  3.62 14.80 0.0389 0.0020 0.917 -12.1 0.1201 79.5 1.12
"""
NAMES = (
    "bits_per_value",
    "bits_per_value_total",
    "ppl",
    "kl",
    "kl_se",
    "top1",
    "logit_db",
    "attention_error",
    "decode_tokens_per_s",
    "decode_vs_bf16",
)


def invented_rows():
    rows = []
    for line in INVENTED.strip().splitlines():
        method, *numbers = line.split()
        row = {"method": method, **dict(zip(NAMES, map(float, numbers), strict=True))}
        full = 2 * 30 * 3 * 64 * 2048 * 2
        rows.append(
            row | {"cache_bytes": int(full * row["bits_per_value_total"] / 16), "bf16_bytes": full}
        )
    return rows


def metrics_of(rows, **more):
    return {
        "model": "SmolLM2-135M-Instruct",
        "text": "wikitext-2",
        "context": 2048,
        "windows": 4,
        "layout": {"sink": 4, "recent": 64, "page": 64},
        "stamp": {
            "date": "2026-01-02T03:04:05+00:00",
            "kvjax": "0.1.0",
            "git": "abc1234+",
            "jax": "0.11.0",
            "python": "3.12.3",
            "device": "cpu (cpu, 1 device)",
            "seed": 0,
            "command": "kvjax compare --model smollm2 --context 2048 --windows 4",
        },
        "rows": rows,
        "full": {"ppl": 14.2083},
        **more,
    }


SAMPLES = [
    {
        "prompt": "the castle was built in",
        "method": "full cache",
        "text": "the 12th century by the counts of Foix, who held it until",
    },
    {
        "prompt": "the castle was built in",
        "method": "turboquant-3",
        "text": "the 12th century by the lords of the valley, and it was",
    },
    {
        "prompt": "The river rises near",
        "method": "full cache",
        "text": "the village and flows south",
    },
    {
        "prompt": "The river rises near",
        "method": "turboquant-3",
        "text": "the village and flows south",
    },
]


def plain(metrics):
    out = io.StringIO()
    print_table(metrics, Console(file=out, width=80))
    return out.getvalue()


def page(metrics, folder):
    path = write_report(metrics, folder)
    assert path == folder / "report.html"
    return path.read_text("utf-8")


def body(text):
    """What a reader sees: no picture, style, script or tags."""
    text = re.sub(r"<(style|script)>.*?</\1>|<img[^>]*>", "", text, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", text))


def test_report_has_every_method_the_stamp_and_the_command(tmp_path):
    metrics = metrics_of(invented_rows(), samples=SAMPLES)
    text = page(metrics, tmp_path)
    seen = body(text)
    assert len(metrics["rows"]) == 20
    for row in metrics["rows"]:
        assert f'<th scope="row">{row["method"]}' in text
    for value in metrics["stamp"].values():
        assert str(value) in seen
    for column in COLUMNS:
        assert column.title in seen
        assert column.meaning in seen
    assert "14.21" in seen
    assert text.count("<tr") == 21


def test_report_loads_nothing_from_outside(tmp_path):
    text = page(metrics_of(invented_rows()), tmp_path)
    assert not re.search(r"(?:src|href)\s*=\s*(?![\"']?data:)", text)
    assert "url(" not in text
    assert "@import" not in text
    inside = re.search(r'src="data:image/png;base64,([^"]+)"', text)[1]
    assert base64.b64decode(inside) == (tmp_path / "pareto.png").read_bytes()


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_picture_opens_and_has_its_size(tmp_path, count):
    page(metrics_of(invented_rows()[:count]), tmp_path)
    with Image.open(tmp_path / "pareto.png") as image:
        image.load()
        assert image.size == (1200, 800)
        assert image.format == "PNG"


def test_same_metrics_same_files_and_no_parts_left(tmp_path):
    metrics = metrics_of(invented_rows())
    files = []
    for _ in range(2):
        write_report(metrics, tmp_path / "deep" / "er")
        files.append(
            [(tmp_path / "deep/er" / name).read_bytes() for name in ("pareto.png", "report.html")]
        )
    assert files[0] == files[1]
    assert sorted(p.name for p in (tmp_path / "deep/er").iterdir()) == ["pareto.png", "report.html"]


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    old = page(metrics_of(invented_rows()), tmp_path)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("kvjax.evals.report.os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(metrics_of(invented_rows()[:2]), tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pareto.png", "report.html"]


HOSTILE = '<script>alert("x")</script>\x1b[31m$\\frac$ [red]&amp;\ud800'


def test_hostile_names_are_text_everywhere(tmp_path):
    row = invented_rows()[3] | {"method": HOSTILE}
    metrics = metrics_of([row, row | {"kl": None}])
    metrics |= {"model": HOSTILE, "text": HOSTILE, "stamp": {HOSTILE: HOSTILE, "command": HOSTILE}}
    metrics["samples"] = [{"prompt": HOSTILE, "method": HOSTILE, "text": HOSTILE}]
    text = page(metrics, tmp_path)
    assert text.count("<script") == 1
    assert "alert(&quot;x&quot;)" in text
    assert "\x1b" not in text
    assert "\x1b" not in plain(metrics)
    assert "[red]" in plain(metrics)
    out = io.StringIO()
    print_table(metrics, Console(file=out, force_terminal=True, width=200, color_system=None))
    assert "\x1b" not in out.getvalue()


@given(st.text(max_size=40))
def test_one_line_is_printable(text):
    assert one_line(text).isprintable()


def test_not_measured_is_a_dash_never_zero(tmp_path):
    rows = [
        {"method": "int4"} | dict.fromkeys([*NAMES, "cache_bytes", "bf16_bytes"]),
        {"method": "int3"},
        {},
    ]
    metrics = {"rows": rows}
    for column in COLUMNS:
        assert [column.show(row) for row in rows] == ["–"] * 3
        assert [column.value(row) for row in rows] == [None] * 3
    cells = re.findall(r'<td data-v="([^"]*)">([^<\n]*)', page(metrics, tmp_path))
    assert cells == [("", "–")] * (3 * len(COLUMNS))
    lines = plain(metrics).splitlines()
    assert lines[1].split() == ["int4", *["–"] * len(COLUMNS)]
    assert "0" not in lines[1]
    assert "No method was measured at 2.5 bits" in summary(metrics)
    assert kl_text({"kl": 0.5}) == "0.5000 ± –"


def test_empty_metrics(tmp_path):
    assert "0 methods" in page({}, tmp_path)
    assert plain({}).startswith("method")


@pytest.mark.parametrize("bad", ["fast", True, [1]])
def test_what_is_not_a_number_is_an_error(tmp_path, bad):
    with pytest.raises(InputError, match="kl of int8"):
        write_report(metrics_of([{"method": "int8", "kl": bad, "bits_per_value": 8.5}]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_diverged_is_shown_and_off_the_front(tmp_path):
    rows = [
        *invented_rows()[:2],
        {"method": "burst", "bits_per_value": 1.0, "kl": math.nan, "ppl": math.inf},
    ]
    rows = json.loads(json.dumps(rows))
    text = page(metrics_of(rows), tmp_path)
    assert "for want of bits or KL: burst" in text
    assert "nan ± –" in text
    assert [row["method"] for row in front_rows(rows)] == ["int8", "bf16"]


def test_no_bf16_row(tmp_path):
    seen = body(page(metrics_of(invented_rows()[1:]), tmp_path))
    assert "turboquant-4 is on the Pareto front" in " ".join(seen.split())


def test_summary_follows_the_data():
    rows = invented_rows()
    text = summary(metrics_of(rows))
    picks = re.findall(r"Up to (\S+) bits per value, <strong>(\S+)</strong>", text)
    assert picks == [("2.5", "turboquant-2"), ("3.5", "turboquant-3"), ("4.5", "turboquant-4")]
    assert "cannot be told" not in text
    rows.append(rows[13] | {"method": "twin", "bits_per_value": 3.4, "kl": 0.0281})
    assert "twin cannot be told from it by KL" in summary(metrics_of(rows))
    assert "Up to 4.5 bits it is still the best." in summary(metrics_of(rows[10:12]))


def test_samples_beside_the_full_cache(tmp_path):
    text = page(metrics_of(invented_rows(), samples=SAMPLES), tmp_path)
    assert text.count('<div class="pair">') == 2
    assert "the 12th century by the <mark>lords of the valley, and it was</mark>" in text
    assert "turboquant-3 (the same text)" in text
    assert "<mark>" not in page(metrics_of(invented_rows()), tmp_path)


def test_pareto_front_by_hand():
    points = [(4, 0.2), (2, 0.5), (3, 0.5), (8, 0.1), (4, 0.1), (1, 0.9), (9, 0.0), (5, 0.3)]
    assert [points[i] for i in pareto_front(points)] == [(1, 0.9), (2, 0.5), (4, 0.1), (9, 0.0)]
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front_is_what_nobody_beats(points):
    def beaten(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    front = pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not beaten(p)]
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_plain_table_can_be_piped():
    rows = invented_rows()
    rows.append(rows[0] | {"method": "a-name-that-goes-on/" * 8, "kl": 1e-12, "ppl": 1e30})
    text = plain(metrics_of(rows))
    lines = text.splitlines()
    assert "\x1b" not in text
    assert not re.search("[│┃─━╭╰|]", text)
    assert max(map(len, lines)) <= 160
    assert len({len(line) for line in lines[: len(rows) + 1]}) == 1
    assert lines[1].split()[:5] == ["bf16", "16.00", "16.00", "45.0", "1.00x"]
    assert "3.1e-06 ± 4.0e-07" in lines[1]
    assert "sink 4, recent 64, page 64" in text
    assert "the first 4 tokens and the last 64 to 127" in text.replace("\n", " ")


def test_plain_table_in_a_narrow_encoding():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_table({"rows": [{"method": "naïve"}]}, Console(file=file))
    file.flush()
    assert raw.getvalue().startswith(b"method")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_terminal_table_shows_every_number_at_any_width(width):
    out = io.StringIO()
    rows = invented_rows()
    print_table(
        metrics_of(rows), Console(file=out, force_terminal=True, width=width, color_system=None)
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for column in COLUMNS:
        for row in rows:
            assert column.show(row) in text


def test_number_formats():
    assert [small(x) for x in (0.0, 0.00005, 0.0001, 0.12345, -3e-9, None)] == [
        "0",
        "5.0e-05",
        "0.0001",
        "0.1235",
        "-3.0e-09",
        "–",
    ]
    assert (
        exact({"sink": 4, "recent": 0, "page": 1})
        == "exact (bf16): the first 4 tokens and the last 0"
    )
    assert "not recorded" in exact({"sink": 4})


def test_families():
    examples = {
        "bf16": "bf16",
        "int4": "int",
        "hadamard-int2": "hadamard-int",
        "kivi-2": "kivi",
        "turboquant-2.5": "turboquant",
        "turboquant-prod-3": "turboquant-prod",
        "qjl": "qjl",
        "kivi-2/int4": "mixed",
        "integer": "other",
        "<b>": "other",
    }
    assert {name: family(name) for name in examples} == examples
    assert len(set(FAMILIES.values())) == len({c for c, _ in FAMILIES.values()}) == len(FAMILIES)
    assert len({m for _, m in FAMILIES.values()}) == len(FAMILIES)
