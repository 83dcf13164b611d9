"""A comparison as a picture and a page: `pareto.png` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from kvjax.evals.families import family
from kvjax.evals.pareto import pareto_png
from kvjax.evals.table import (
    COLUMNS,
    DASH,
    Row,
    exact,
    fixed,
    front_rows,
    kl_text,
    measured,
    number,
    one_line,
    point,
    setting,
)

BUDGETS = (2.5, 3.5, 4.5)  # true bits per value that the summary speaks about


def write_report(metrics: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Writes `pareto.png` and `report.html` into `folder`, each whole or not at all.

    Args:
      metrics: what `kvjax compare` writes as `metrics.json`; keys may be missing, numbers null.
      folder: made if it is not there.
    Returns:
      The path of the page.
    Raises:
      InputError: a value that is not a number where one is due.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png = pareto_png(metrics)
    page = report_html(metrics, png).encode("utf-8", "xmlcharrefreplace")
    _replace(folder / "pareto.png", png)
    _replace(folder / "report.html", page)
    return folder / "report.html"


def report_html(metrics: Mapping[str, Any], png: bytes) -> str:
    """The page: one file that loads nothing from outside, with all data escaped."""
    rows = metrics.get("rows") or []
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    absent = [row for row in rows if row not in measured(rows)]
    left = ", ".join(_text(row.get("method")) for row in absent)
    model = _text(metrics.get("model"))
    return PAGE.substitute(
        title=f"KV cache compression: {model}",
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        style=STYLE,
        script=SCRIPT,
        summary=summary(metrics),
        png=base64.b64encode(png).decode(),
        left=f" Not in the plot, for want of bits or KL: {left}." if absent else "",
        table=_table(rows),
        setting=_text(setting(metrics)),
        reading=_reading(metrics),
        samples=_samples(metrics.get("samples") or []),
        stamp=_stamp(metrics.get("stamp") or {}),
    )


def summary(metrics: Mapping[str, Any]) -> str:
    """The result in one paragraph of HTML: the best method within each of `BUDGETS`."""
    rows = metrics.get("rows") or []
    number_of = f"{len(rows)} method{'' if len(rows) == 1 else 's'}"
    windows, context = (fixed(number(metrics, name), 0) for name in ("windows", "context"))
    parts = [
        f"{number_of} for compressing the cache of {_text(metrics.get('model'))}, compared on "
        f"{_text(metrics.get('text'))} ({windows} windows of {context} tokens) by how far the "
        "predictions move from those with the full cache (KL; 0 is no change)."
    ]
    front, last = front_rows(rows), None
    for budget in BUDGETS:
        within = [row for row in front if point(row)[0] <= budget]
        if not within:
            parts.append(f"No method was measured at {budget} bits per value or fewer.")
        elif within[-1] is last:
            parts.append(f"Up to {budget} bits it is still the best.")
        else:
            last = within[-1]
            parts.append(_pick(last, budget, rows))
    ppl = number(metrics.get("full") or {}, "ppl")
    if ppl is not None:
        parts.append(f"The full cache has perplexity {fixed(ppl)}.")
    return " ".join(parts)


def _pick(best: Row, budget: float, rows: Sequence[Row]) -> str:
    facts = [f"{fixed(point(best)[0])} bits", f"KL {kl_text(best)}"]
    words = {"ppl": "perplexity {}", "top-1 %": "the same top token {} % of the time"}
    words["of bf16"] = "a cache {} the size of bf16"
    cells = [(words.get(c.header), c.show(best)) for c in COLUMNS]
    facts += [word.format(cell) for word, cell in cells if word and cell != DASH]
    said = (
        f"Up to {budget} bits per value, <strong>{_text(best.get('method'))}</strong> is on the "
        f"Pareto front with the lowest KL ({', '.join(facts)})"
    )
    peers = [row for row in measured(rows) if row is not best and point(row)[0] <= budget]
    same = ", ".join(_text(r.get("method")) for r in peers if _told_apart(r, best) is False)
    return f"{said}; {same} cannot be told from it by KL." if same else f"{said}."


def _told_apart(a: Row, b: Row) -> bool | None:
    """Whether two KLs differ by over two standard errors of their difference; None: unknown."""
    error, other = number(a, "kl_se"), number(b, "kl_se")
    if error is None or other is None:
        return None
    return abs(point(a)[1] - point(b)[1]) > 2 * math.hypot(error, other)


def _table(rows: Sequence[Row]) -> str:
    best = {id(row) for row in front_rows(rows)}
    heads = [("method", "what was used; KEYS/VALUES if two were mixed")]
    heads += [(column.title, column.meaning) for column in COLUMNS]
    head = "".join(
        f'<th scope="col" title="{_text(meaning)}"><button type="button">{_text(title)}</button>'
        for title, meaning in heads
    )
    body = "".join(
        f"<tr{' class=front' if id(row) in best else ''}>"
        f'<th scope="row">{_text(row.get("method"))}{"".join(map(_cell(row), COLUMNS))}\n'
        for row in rows
    )
    return f"<table><thead><tr>{head}</thead><tbody>\n{body}</tbody></table>"


def _cell(row: Row):
    def cell(column) -> str:
        value = column.value(row)
        key = "" if value is None or not math.isfinite(value) else repr(value)
        return f'<td data-v="{key}">{_text(column.show(row))}'

    return cell


def _reading(metrics: Mapping[str, Any]) -> str:
    layout = metrics.get("layout") or {}
    notes = [
        ("exact windows", f"{exact(layout)}; every method has them, and they are not compressed."),
        (
            "true bits",
            "all that has to be stored to read a number back. Bits with windows adds the exact "
            "tokens: it falls towards bits per value as the context grows.",
        ),
        ("front", "no other method has both fewer bits and a lower KL; bold in the table."),
        (DASH, "not measured."),
    ]
    items = [(column.title, column.meaning) for column in COLUMNS] + notes
    return "".join(f"<dt>{_text(term)}<dd>{_text(meaning)}\n" for term, meaning in items)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Each prompt once: the full cache on the left, every compressed one beside it."""
    if not samples:
        return ""
    parts = []
    for prompt in dict.fromkeys(str(sample.get("prompt") or "") for sample in samples):
        here = [s for s in samples if str(s.get("prompt") or "") == prompt]
        full = next((s for s in here if _is_full(s)), None)
        text = None if full is None else str(full.get("text") or "")
        left = "" if full is None else _sample(full, None)
        right = "".join(_sample(s, text) for s in here if s is not full)
        parts.append(
            f"<h3>After a text that ends with</h3>"
            f"<blockquote>{_text(prompt, lines=True)}</blockquote>"
            f'<div class="pair"><div>{left}</div><div>{right}</div></div>'
        )
    note = "<p>Marked: from where a text leaves that of the full cache.</p>"
    return f"<section><h2>Samples</h2>{note}{''.join(parts)}</section>"


def _is_full(sample: Mapping[str, Any]) -> bool:
    name = str(sample.get("method") or "").lower()
    return name.startswith("full") or family(name) == "bf16"


def _sample(sample: Mapping[str, Any], full: str | None) -> str:
    text = str(sample.get("text") or "")
    same = len(text) if full is None else _common(text, full)
    tail = f"<mark>{_text(text[same:], lines=True)}</mark>" if same < len(text) else ""
    note = " (the same text)" if full is not None and text == full else ""
    return (
        f"<h4>{_text(sample.get('method'))}{note}</h4>"
        f"<pre>{_text(text[:same], lines=True)}{tail}</pre>"
    )


def _common(text: str, full: str) -> int:
    """Characters of `text`, in whole words, before it leaves `full`."""
    pairs = enumerate(itertools.zip_longest(text, full))
    end = next((i for i, (a, b) in pairs if a != b), len(text))
    return end if end == len(text) else text.rfind(" ", 0, end) + 1


def _stamp(stamp: Mapping[str, Any]) -> str:
    command = stamp.get("command")
    if isinstance(command, (list, tuple)):
        command = shlex.join(map(str, command))
    facts = "".join(
        f"<dt>{_text(name)}<dd>{_text(value)}\n"
        for name, value in stamp.items()
        if name != "command"
    )
    facts = f"<dl>{facts}</dl>" if facts else f"<p>{DASH}</p>"
    return f"{facts}<p>To reproduce:</p><pre>{_text(command, lines=True)}</pre>"


def _text(value: object, lines: bool = False) -> str:
    """A value as HTML text or attribute; with `lines`, line ends and indents stay."""
    if not lines:
        return html.escape(one_line(value))
    text = DASH if value is None else str(value)
    kept = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return html.escape(kept)


def _replace(path: Path, content: bytes) -> None:
    """Writes beside `path` and renames, so that a reader sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6773; --line: #d9dee4;
  --paper: #fff; --tint: #f4f6f8; --accent: #0b63b0; --mark: #fde7b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --soft: #9aa5b1;
  --line: #363f4a; --paper: #14181d; --tint: #1d232a; --accent: #7cb8f2; --mark: #5a4510; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem 1.2rem 4rem; max-width: 74rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem } h3, h4 { font-size: 1rem; margin: 1rem 0 .3rem }
p, dd { max-width: 46rem; overflow-wrap: anywhere } .lead { font-size: 1.08rem }
.note { color: var(--soft); font-size: .9rem }
figure { margin: 1.5rem 0 } figcaption { margin-top: .4rem }
img { width: 100%; max-width: 1200px; height: auto; border-radius: 6px; display: block }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  width: 100% }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
thead th { vertical-align: bottom; border-bottom-width: 2px; white-space: normal }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
tbody th { font-weight: 400; min-width: 11.5rem; max-width: 16rem;
  white-space: normal; overflow-wrap: anywhere }
.front th, .front td { font-weight: 650 }
th button { all: unset; cursor: pointer; font-weight: 600; color: var(--accent) }
th button:focus-visible { outline: 2px solid var(--accent) }
[aria-sort=ascending] button::after { content: " \\2191" }
[aria-sort=descending] button::after { content: " \\2193" }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1.2rem;
  margin: 0 } dt { font-weight: 600 } dd { margin: 0 }
pre, blockquote { background: var(--tint); border-radius: 6px; padding: .7rem .9rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem }
blockquote { border-left: 3px solid var(--accent); border-radius: 0 }
mark { background: var(--mark); color: inherit }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.2rem }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr } body { padding: .5rem .9rem 3rem }
  tbody th { min-width: 8.6rem } figure { overflow-x: auto } img { min-width: 40rem } }
@page { size: A4 landscape; margin: 12mm }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --tint: #f4f6f8; --line: #ccc;
  --accent: #000; --mark: #fde7b0; color-scheme: light } body { font-size: 10pt; padding: 0 }
  table { font-size: 8.5pt } .scroll { overflow: visible } figure, tr, pre { break-inside: avoid }
  h2, h3, h4 { break-after: avoid } img { max-width: 145mm } p { max-width: none }
  .screen { display: none } th:first-child { position: static } }
"""

SCRIPT = """
document.querySelectorAll("thead th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    const key = row => {
      const cell = row.cells[column];
      return column ? cell.dataset.v : cell.textContent;
    };
    const order = (a, b) => column ? a - b : a.localeCompare(b, undefined, {numeric: true});
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // not measured: always last
      return up ? order(x, y) : order(y, x);
    });
    body.append(...rows);
    head.parentNode.querySelectorAll("th").forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  });
});
"""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$summary</p>
<figure>
<img alt="KL to the full cache against true bits per value; the numbers are in the table below"
  width="1200" height="800" src="data:image/png;base64,$png">
<figcaption class="note">Down and to the left is better: less change, fewer bits.$left</figcaption>
</figure>
<section>
<h2>All methods</h2>
<div class="scroll" tabindex="0">$table</div>
<p class="note">$setting. Bold: on the Pareto front.
<span class="screen">Click a heading to sort.</span></p>
</section>
<section>
<h2>How to read this</h2>
<dl>$reading</dl>
</section>
$samples
<section>
<h2>Where the numbers come from</h2>
$stamp
</section>
<script>$script</script>
</body>
</html>
""")
