"""Greedy continuations of both models, and the gates on repetition, loops and length in them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

from se_compress.artifacts import Check, Continuation, RunOptions
from se_compress.model.measures import distinct, find_loop
from se_compress.model.streaming import StreamedModel
from se_compress.recipe import Validation
from se_compress.text.prompts import end_tokens, prompts_of
from se_compress.validation.checks import judged, not_judged
from se_compress.validation.predictions import Decode
from se_compress.validation.side_by_side import Original, continuations

GATES_ON_IT = ("repetition", "loops", "unfinished", "length_change")


def continue_both(
    original: Original,
    result: StreamedModel,
    validation: Validation,
    options: RunOptions,
    decode: Decode,
) -> tuple[tuple[Continuation, ...], dict[str, tuple[Check, ...]]]:
    """Both models go on with the beginnings of some held-out sequences, spread over those of each
    domain. Also the checks of each domain by its name."""
    count, source = validation.generation.tokens, original.model.source
    if not count:
        return (), {name: _none(validation.of(name)) for name in original.texts}
    prompts = prompts_of(original.texts, validation, source.path)
    ends = end_tokens(source)
    everything = [prompt for text in prompts.values() for prompt in text]
    batches = len({len(prompt) for prompt in everything})
    steps = _steps("generate", 2 * batches * count, options)
    old = original.generate(everything, count, lambda: next(steps))
    new = continuations(result, everything, count, lambda: next(steps))
    made = [
        _continuation(prompt, before, after, ends, validation, decode)
        for prompt, before, after in zip(everything, old, new, strict=True)
    ]
    found: dict[str, tuple[Check, ...]] = {}
    named: list[Continuation] = []
    for name, text in prompts.items():
        here = made[len(named) : len(named) + len(text)]
        found[name] = _checks(here, validation.of(name))
        named += [replace(one, domain=name or None) for one in here]
    return tuple(named), found


def _none(validation: Validation) -> tuple[Check, ...]:
    reason = "validation.generation.tokens is 0"
    asked = filter(validation.asks, GATES_ON_IT)
    return tuple(not_judged(validation, gate, reason) for gate in asked)


def _steps(stage: str, total: int, options: RunOptions) -> Iterator[None]:
    for done in range(1, total + 1):
        options.progress(stage, done, total)
        yield


def _checks(made: Sequence[Continuation], validation: Validation) -> tuple[Check, ...]:
    """Repetition and loops; of the other gates those that have a limit."""
    found = [_repetition(made, validation), _loops(made, validation)]
    if validation.asks("unfinished"):
        found.append(_unfinished(made, validation))
    if validation.asks("length_change"):
        found.append(_length_change(made, validation))
    return tuple(found)


def _repetition(made: Sequence[Continuation], validation: Validation) -> Check:
    old = fmean(1 - (one.distinct_source or 0.0) for one in made)
    new = fmean(1 - (one.distinct_result or 0.0) for one in made)
    return judged(validation, "repetition", new - old, f"source {old:.3f}, result {new:.3f}")


def _loops(made: Sequence[Continuation], validation: Validation) -> Check:
    before, after = ([one.loop_source for one in made], [one.loop_result for one in made])
    loops_before, loops_after = sum(map(bool, before)), sum(map(bool, after))
    detail = f"source {loops_before} of {len(made)}, result {loops_after}"
    added = [loop for was, loop in zip(before, after, strict=True) if loop and not was]
    if added:
        worst = max(added, key=lambda loop: loop.length)
        detail += f"; one says the same {worst.period} tokens for {worst.length}"
    return judged(validation, "loops", (loops_after - loops_before) / len(made), detail)


def _unfinished(made: Sequence[Continuation], validation: Validation) -> Check:
    old = sum(one.length_source is None for one in made)
    new = sum(one.length_result is None for one in made)
    detail = f"source {old} of {len(made)}, result {new}"
    return judged(validation, "unfinished", (new - old) / len(made), detail)


def _length_change(made: Sequence[Continuation], validation: Validation) -> Check:
    limit = validation.generation.tokens
    old = fmean(one.length_source or limit for one in made)
    new = fmean(one.length_result or limit for one in made)
    detail = f"source {old:.1f} tokens, result {new:.1f}, of at most {limit}"
    return judged(validation, "length_change", abs(new / old - 1), detail)


def _continuation(
    prompt: Sequence[int],
    old: Sequence[int],
    new: Sequence[int],
    ends: frozenset[int],
    validation: Validation,
    decode: Decode,
) -> Continuation:
    """What was made of a prompt. An answer to a message is over at its end token; of text that is
    gone on with, all is looked at, as a text may hold several documents."""
    before, after = _length(old, ends), _length(new, ends)
    if validation.generation.chat_template:
        old, new = old[:before], new[:after]
    return Continuation(
        prompt=decode(prompt),
        source=decode(old),
        result=decode(new),
        distinct_source=distinct(old),
        distinct_result=distinct(new),
        loop_source=find_loop(old),
        loop_result=find_loop(new),
        length_source=before,
        length_result=after,
    )


def _length(ids: Sequence[int], ends: frozenset[int]) -> int | None:
    """Tokens up to the first end token, that counted; None if there is none."""
    return next((at + 1 for at, token in enumerate(ids) if token in ends), None)
