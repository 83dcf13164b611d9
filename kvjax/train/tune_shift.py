"""What a model was tuned for, found by perplexity, and taught to another model: TuneShift-KD."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.core.errors import InputError
from kvjax.generate import generate, make_plan
from kvjax.methods import get
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Params
from kvjax.models.tokenizer import Tokenizer
from kvjax.train.answers import Example, perplexities

Answer = Callable[[Sequence[str]], list[str]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """Prompts with the tuned model's answers, and how the two models find these.

    Attributes:
      prompts, answers: texts. base, tuned: `[n]`, perplexity of the answers.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    base: np.ndarray
    tuned: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """`[n]`: how many times more surprised the base model is than the tuned one."""
        return self.base / self.tuned

    def special(self, threshold: float) -> Judged:
        """Those whose gap is above the threshold: what tuning taught.

        Raises:
          InputError: a threshold that is not above 0.
        """
        if not 0 < threshold < np.inf:
            raise InputError(
                "threshold", got=threshold, expected="a ratio above 0", fix="2 is a good start"
            )
        keep = np.flatnonzero(self.gap > threshold)
        pick = lambda texts: tuple(texts[i] for i in keep)
        return Judged(pick(self.prompts), pick(self.answers), self.base[keep], self.tuned[keep])

    def midpoint(self) -> float:
        """A threshold halfway, in factors, between no gap and the median gap of these prompts.

        For seeds that are known to be special: of what a model was tuned for it has learned the
        answers, and whatever else tuning did to it makes a smaller difference. Ours; the paper's
        abstract names no threshold.
        """
        return float(np.sqrt(np.median(self.gap)))

    def joined(self, other: Judged) -> Judged:
        """These and the others."""
        both = lambda a, b: np.concatenate([a, b])
        return Judged(
            self.prompts + other.prompts,
            self.answers + other.answers,
            both(self.base, other.base),
            both(self.tuned, other.tuned),
        )


def judge(
    prompts: Sequence[str],
    answers: Sequence[str],
    base: Params,
    tuned: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
) -> Judged:
    """Perplexities of the answers under the base model and the tuned one.

    Prompts without an answer are left out: there is nothing to judge. Nothing may be left.

    Args:
      answers: of the tuned model; see `answerer`. base, tuned: weights of one architecture.
    Raises:
      InputError: no prompts, or not as many answers as prompts; models whose vocabularies differ.
    """
    sizes = [p.embed.shape[0] for p in (base, tuned)]
    if sizes[0] != sizes[1]:
        raise InputError(
            "base and tuned models",
            got=f"vocabularies of {sizes[0]} and {sizes[1]}",
            expected="one, so that both read the same answers",
            fix="take the model that the tuned one was made of",
        )
    if len(prompts) != len(answers):
        raise InputError(
            "answers",
            got=f"{len(answers)} for {len(prompts)} prompts",
            expected="one for each",
            fix="answer all of them",
        )
    pairs = [(p, a) for p, a in zip(prompts, answers, strict=True) if a]
    if prompts and not pairs:
        return Judged((), (), np.zeros(0), np.zeros(0))
    examples = [example(tokenizer, *pair) for pair in pairs]
    found = [perplexities(params, config, examples) for params in (base, tuned)]
    return Judged(tuple(p for p, _ in pairs), tuple(a for _, a in pairs), *found)


def example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    """A prompt and its answer, which ends the line, in a model's own tokens."""
    return Example(
        tuple(tokenizer.encode(prompt)), tuple(tokenizer.encode(answer + "\n", bos=False))
    )


def answerer(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    max_new: int = 24,
    together: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answer:
    """Continues prompts to the end of their line with a bf16 cache, `together` at a time.

    Args:
      temperature: 0 takes the best token each time. seed: rises by one with every `together`.
    """
    import jax

    plan = make_plan(config, get("bf16", config.head_dim))
    calls = iter(range(seed, 1 << 30))

    def answer(prompts: Sequence[str]) -> list[str]:
        found: list[str] = []
        for first in range(0, len(prompts), together):
            some = list(prompts[first : first + together])
            ids = [tokenizer.encode(p) for p in some + some[:1] * (together - len(some))]
            rng = jax.random.key(next(calls))
            tokens, _ = generate(
                plan, params, ids, max_new=max_new, temperature=temperature, rng=rng
            )
            ends = set(config.eos_ids)
            for row in np.asarray(tokens)[: len(some)].tolist():
                stop = next((i for i, token in enumerate(row) if token in ends), len(row))
                found.append(tokenizer.decode(row[:stop]).split("\n")[0].rstrip())
        return found

    return answer


def expand(
    seeds: Judged,
    complete: Answer,
    judge_prompts: Callable[[Sequence[str]], Judged],
    *,
    wanted: int,
    threshold: float,
    frame: tuple[str, str],
    shots: int = 4,
    together: int = 16,
    rounds: int = 10,
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Judged:
    """More special prompts, written by the tuned model after examples, and judged like the seeds.

    Each round shows the model some of the prompts found so far and lets it write the next one; new
    ones whose gap is above the threshold stay.

    Args:
      seeds: prompts to begin with, all special. complete: the tuned model, sampling.
      judge_prompts: answers and judges prompts.
      wanted: prompts in the end, seeds included. rounds: at most so many.
      frame: what stands before and after a question in a prompt.
      shots: prompts shown at a time.
    Returns:
      At most `wanted`, the seeds first.
    Raises:
      InputError: no seeds.

    Source: TuneShift-KD, arXiv 2603.24518, of which the abstract describes this loop; how prompts
      are asked for is ours.
    """
    if not seeds.prompts:
        raise InputError(
            "seeds",
            got="none that is special",
            expected="one or more",
            fix="lower the threshold, or give prompts of what the model was tuned for",
        )
    before, after = frame
    question = lambda prompt: prompt.removeprefix(before).removesuffix(after)
    draw, found = np.random.default_rng(seed), seeds
    seen = set(found.prompts)
    for number in range(rounds):
        if len(found.prompts) >= wanted:
            break
        shown = [
            draw.choice(found.prompts, min(shots, len(found.prompts)), replace=False)
            for _ in range(together)
        ]
        asks = ["".join(f"{before}{question(str(p))}\n" for p in some) + before for some in shown]
        new = dict.fromkeys(
            before + text.strip() + after for text in complete(asks) if text.strip()
        )
        fresh = [prompt for prompt in new if prompt not in seen]
        seen.update(fresh)
        if fresh:
            more = judge_prompts(fresh).special(threshold)
            found = found.joined(more)
        say(f"round {number + 1}: {len(fresh)} new prompts, {len(found.prompts)} special so far")
    cut = slice(wanted)
    return Judged(found.prompts[cut], found.answers[cut], found.base[cut], found.tuned[cut])
