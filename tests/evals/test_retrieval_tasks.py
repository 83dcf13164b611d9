"""Retrieval tasks: exact lengths, needles where they should be, answers that are in the text."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from kvjax.core.errors import InputError
from kvjax.evals.haystack import ADJECTIVES, NOISE, NOUNS, Sample, bury, fit, to_tokens
from kvjax.evals.retrieval_tasks import DEPTHLESS, TASKS, build
from kvjax.evals.ruler_file import read_ruler

RULER = Path(__file__).parents[2].parent / "shared" / "data" / "ruler"
PROSE = " ".join(
    f"It was day {w}, and the {n} of that {w} day was gone."
    for w, n in zip(ADJECTIVES, NOUNS, strict=False)
)


class Toy:
    """A tokenizer of words with the space before them, single digits, and single other characters."""

    def __init__(self):
        self.pieces = {"<bos>": 0}

    def encode(self, text, *, bos=True):
        pieces = re.findall(r" ?[A-Za-z]+|[\s\S]", text)
        ids = [self.pieces.setdefault(piece, len(self.pieces)) for piece in pieces]
        return [0, *ids] if bos else ids

    def decode(self, ids):
        names = list(self.pieces)
        return "".join(names[i] for i in ids if i)


TOY = Toy()
# The tokens of the largest unit of filler, less one: what may be missing.
SLACK = {"key_value": 8, "key_value_uuid": 75, "frequent_words": 3, "common_words": 2}
SHORTEST = {"common_words": 420}


def make(task, length=600, depth=0.5, **options) -> Sample:
    return build(task, TOY, length=length, depth=None if task in DEPTHLESS else depth, **options)


def tokens(sample: Sample) -> int:
    return sum(map(len, to_tokens(TOY, sample)))


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact(task):
    slack = SLACK.get(task, 5)  # "There and back again."
    for length in (SHORTEST.get(task, 170), 421, 600, 997):
        for seed in range(3):
            assert length - slack <= tokens(make(task, length, seed=seed)) <= length


@pytest.mark.parametrize("task", ["passkey", "copy", "multi_value"])
def test_lengths_are_exact_around_a_given_text(task):
    longest = max(len(TOY.encode(s, bos=False)) + 1 for s in re.split(r"(?<=\.) ", PROSE))
    found = set()
    for seed in range(4):
        sample = make(task, 500, seed=seed, filler=PROSE)
        assert 500 - longest < tokens(sample) <= 500
        filler = re.findall(
            r"It was day \w+, and the \w+ of that \w+ day was gone\.", sample.context
        )
        assert len(filler) > 15
        assert len(set(filler)) == len(filler)
        assert all(s in PROSE for s in filler)
        found.add(filler[0])
    assert len(found) > 1  # a seed begins where it likes


@pytest.mark.parametrize("task", [t for t in TASKS if t not in (*DEPTHLESS, "variables")])
def test_answers_stand_in_the_context_once(task):
    for seed in range(3):
        sample = make(task, seed=seed)
        assert [sample.context.count(a) for a in sample.answers] == [1] * len(sample.answers)
        assert not any(a in sample.question for a in sample.answers)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_is_a_sample(task):
    assert make(task, seed=3) == make(task, seed=3)
    others = [make(task, seed=4), make(task, 601, seed=3)]
    others += [make(task, depth=0.6, seed=3)] if task not in DEPTHLESS else []
    assert make(task, seed=3).answers not in [sample.answers for sample in others]


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_needle_is_at_its_depth(depth):
    context = make("passkey", depth=depth).context.split("\n", 1)[1]
    needle = re.search(r"The pass key is \d{5}\. Remember it\.", context)
    assert needle is not None
    before, after = context[: needle.start()], context[needle.end() :]
    assert (before == "") == (depth == 0)
    assert (after == "") == (depth == 1)
    assert abs(len(before) - depth * (len(before) + len(after))) <= max(map(len, NOISE)) / 2 + 2

    for task in ("multi_key", "multi_query"):
        context = make(task, 900, depth=depth).context.split("\n", 1)[1]
        asked = context.index(make(task, 900, depth=depth).answers[0])
        spans = [m.span() for m in re.finditer(r"One of the special.*?\d{7}\. ?", context)]
        assert len(spans) == 4
        free = len(context) - sum(b - a for a, b in spans)
        above = asked - sum(min(b, asked) - a for a, b in spans if a < asked)
        assert abs(above - depth * free) < max(map(len, NOISE))


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_line_is_at_its_depth(depth):
    sample = make("key_value", depth=depth)
    lines = sample.context.split("\n")
    assert all(re.fullmatch(r"[a-z]+ [a-z]+: \d{4}", line) for line in lines)
    assert len({line.split(":")[0] for line in lines}) == len(lines) > 60
    line = sample.question.strip("\n") + sample.answer
    assert lines.index(line) == round(depth * (len(lines) - 1))


def test_several_values_come_in_the_order_of_the_text():
    for seed in range(4):
        sample = make("multi_value", depth=0.8, seed=seed)
        found = re.findall(r"numbers for (\w+ \w+) is: (\d{7})", sample.context)
        assert tuple(number for _, number in found) == sample.answers
        assert {name for name, _ in found} == {found[0][0]}
        assert f" {found[0][0]} " in sample.question
        queries = make("multi_query", seed=seed)
        number = dict(re.findall(r"numbers for (\w+ \w+) is: (\d{7})", queries.context))
        (asked,) = re.findall(r"numbers for (.*) mentioned", queries.question)
        assert tuple(number[name] for name in asked.split(", ")) == queries.answers
        assert len(number) == 4


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_variables_can_be_followed(depth):
    sample = make("variables", depth=depth)
    value: dict[str, str] = {}
    names: list[str] = []
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))\.", sample.context):
        value[name] = number or value[other]
        names.append(name)
    assert tuple(names) == sample.answers
    assert len(set(names)) == 5
    assert {f"value {v} are:" in sample.question for v in value.values()} == {True}
    assert sample.context.endswith(f"= VAR {names[3]}.")


def test_frequent_words_are_the_frequent_ones():
    for length in (170, 421, 998):
        sample = make("frequent_words", length)
        counts = Counter(sample.context.split("\n", 1)[1].split(" ")).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == sample.answers
        assert counts[1][1] > counts[2][1] > counts[3][1] > counts[4][1]
    # The second of two ranks comes a quarter as often as the first; within one word of it.
    assert abs(counts[1][1] - counts[0][1] / 4) <= 1

    sample = make("common_words", 900)
    times = Counter(sample.context.split("\n", 1)[1].split(" "))
    assert {word for word, n in times.items() if n == 30} == set(sample.answers)
    assert set(times.values()) == {30, 3}


def test_where_the_answer_begins():
    """A space before digits is asked with the question; a word keeps its own."""
    _, question, answer = to_tokens(TOY, make("passkey"))
    assert TOY.decode(question).endswith("The pass key is ")
    assert TOY.decode(answer).isdigit()
    sample = make("copy")
    _, question, answer = to_tokens(TOY, sample)
    assert TOY.decode(answer) == sample.answer
    assert TOY.decode(question) == sample.question
    assert answer[0] == TOY.encode(" " + sample.answers[0].split()[0], bos=False)[0]
    assert f"{sample.question.split('. ')[1]}{sample.answer}." in sample.context


def test_needles_between_sentences():
    rows = ["aaaa", "bb", "c"]  # their ends, with a space: 0, 5, 8, 10
    assert bury(rows, [(0.49, "N")]) == "aaaa N bb c"
    assert bury(rows, [(0.7, "N")]) == "aaaa bb N c"
    assert bury(rows, [(1, "N"), (0, "M"), (1, "O")]) == "M aaaa bb c N O"
    assert bury([], [(0.3, "N")]) == "N"


def test_fit_is_the_most_that_fits():
    for length in range(3, 60):
        text = fit(lambda n: "xyz" + "ab" * n, len, length, 30)
        assert len(text) <= length < len(text) + 2
    with pytest.raises(InputError, match="length: got 2 tokens; expected at least 3"):
        fit(lambda n: "xyz" + "ab" * n, len, 2, 30)
    with pytest.raises(InputError, match="filler: got 30 pieces, 63 tokens"):
        fit(lambda n: "xyz" + "ab" * n, len, 64, 30)


def test_what_does_not_fit_is_said():
    with pytest.raises(InputError, match=r"task: got 'pass'; expected one of passkey, multi_key"):
        make("pass")
    for depth in (-0.1, 1.5, None, float("nan")):
        with pytest.raises(InputError, match="expected a number from 0 to 1"):
            build("passkey", TOY, length=300, depth=depth)
    with pytest.raises(InputError, match=r"got 0\.5; expected None for common_words"):
        build("common_words", TOY, length=900, depth=0.5)
    for task in TASKS:
        with pytest.raises(InputError, match=r"length: got 12 tokens; expected at least \d+"):
            make(task, 12)
    with pytest.raises(InputError, match="length: got -20 tokens; expected 1 or more"):
        make("key_value", -20)
    with pytest.raises(InputError, match="give a longer text"):
        make("passkey", filler="One sentence. And two.")
    with pytest.raises(InputError, match="give a longer text"):
        make("passkey", filler="")
    key = make("passkey", filler=PROSE).answers[0]
    with pytest.raises(InputError, match=f"holds the answer '{key}' too"):
        make("passkey", filler=PROSE.replace("gone", f"gone, {key}"))


def test_word_lists_are_clean():
    words = [*ADJECTIVES, *NOUNS]
    assert len(set(words)) == len(words)
    assert min(len(ADJECTIVES), len(NOUNS)) >= 60


def test_rows_of_ruler(tmp_path):
    path = tmp_path / "vt.jsonl"
    rows = [
        {"input": "Intro\nfar x near\nWhat is it? It is", "outputs": ["near", "7"]},
        {"input": "Some text\nWhat?", "outputs": ["gone"], "answer_prefix": " It is"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    first, second = read_ruler(path, TOY)
    assert first == Sample(
        "Intro\nfar x near", "\nWhat is it? It is", ("near", "7"), "vt", 12 / 16, 14 + 3
    )
    assert tokens(first) == first.length
    assert (second.question, second.depth) == ("\nWhat? It is", None)
    assert read_ruler(path, TOY, length=64, limit=1)[0].length == 64
    for bad in (
        '{"input": "a\\nb"}',
        "[1]",
        "{",
        '{"input": "a", "outputs": ["b"]}',
        '{"input": "a\\nb", "outputs": "b"}',
        '{"input": "a\\nb", "outputs": []}',
        '{"input": "a\\nb", "outputs": [""]}',
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + bad + "\n")
        with pytest.raises(InputError, match=r"line 2: got .*outputs"):
            read_ruler(path, TOY)
    with pytest.raises(InputError, match="No such file"):
        read_ruler(tmp_path / "none.jsonl", TOY)


def test_a_file_of_ruler():
    files = sorted(RULER.glob("niah_multikey_3_*.jsonl")) if RULER.is_dir() else []
    if not files:
        pytest.skip("no RULER file here")
    for sample in read_ruler(files[0], TOY, length=4096, limit=20):
        assert sample.context.count(sample.answers[0]) == 1
        assert sample.question.startswith("\nWhat is the special magic uuid for ")
        assert sample.depth is not None
        assert 0 < sample.depth < 1
        assert sample.context.count("special magic uuids for ") > 40
