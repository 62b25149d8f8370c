"""Greedy continuations of both models, and the gates on repetition and loops in them."""

from collections.abc import Iterator, Sequence

import torch

from se_compress.artifacts import Check, Continuation, RunOptions
from se_compress.model.measures import distinct, find_loop
from se_compress.model.streaming import StreamedModel
from se_compress.recipe import Validation
from se_compress.validation.checks import judged, not_judged
from se_compress.validation.predictions import Decode
from se_compress.validation.side_by_side import Original

Ids = Sequence[Sequence[int]]


def continue_both(
    original: Original,
    result: StreamedModel,
    validation: Validation,
    options: RunOptions,
    decode: Decode,
) -> tuple[tuple[Continuation, ...], dict[str, tuple[Check, ...]]]:
    """Both models go on with the beginnings of some held-out sequences, spread over those of each
    domain. Also the checks of each domain by its name."""
    wanted = validation.generation
    if not wanted.tokens:
        reason = "validation.generation.tokens is 0"
        checks = tuple(not_judged(validation, gate, reason) for gate in ("repetition", "loops"))
        return (), dict.fromkeys(original.texts, checks)
    prompts = {
        name: [s[: wanted.prompt_tokens] for s in text[:: max(1, len(text) // wanted.prompts)]]
        for name, text in original.texts.items()
    }
    prompts = {name: text[: wanted.prompts] for name, text in prompts.items()}
    batch = torch.tensor([prompt for text in prompts.values() for prompt in text])
    steps = _steps("generate", 2 * wanted.tokens, options)
    old = original.generate(batch, wanted.tokens, lambda: next(steps))
    new = result.generate(batch, wanted.tokens, lambda: next(steps)).tolist()
    continuations: list[Continuation] = []
    found: dict[str, tuple[Check, ...]] = {}
    for name, text in prompts.items():
        here = slice(len(continuations), len(continuations) + len(text))
        found[name] = _repetition_checks(old[here], new[here], validation.of(name))
        continuations += _continuations(name, text, old[here], new[here], decode)
    return tuple(continuations), found


def _steps(stage: str, total: int, options: RunOptions) -> Iterator[None]:
    for done in range(1, total + 1):
        options.progress(stage, done, total)
        yield


def _repetition_checks(
    source_ids: Ids, result_ids: Ids, validation: Validation
) -> tuple[Check, Check]:
    count = len(source_ids)
    old, new = (sum(1 - distinct(ids) for ids in side) / count for side in (source_ids, result_ids))
    before, after = ([find_loop(ids) for ids in side] for side in (source_ids, result_ids))
    loops_before, loops_after = (sum(map(bool, loops)) for loops in (before, after))
    detail = f"source {loops_before} of {count}, result {loops_after}"
    added = [loop for was, loop in zip(before, after, strict=True) if loop and not was]
    if added:
        worst = max(added, key=lambda loop: loop.length)
        detail += f"; one says the same {worst.period} tokens for {worst.length}"
    excess = (loops_after - loops_before) / count
    return (
        judged(validation, "repetition", new - old, f"source {old:.3f}, result {new:.3f}"),
        judged(validation, "loops", excess, detail),
    )


def _continuations(
    domain: str, prompts: Ids, source_ids: Ids, result_ids: Ids, decode: Decode
) -> Iterator[Continuation]:
    for prompt, old, new in zip(prompts, source_ids, result_ids, strict=True):
        yield Continuation(
            prompt=decode(prompt),
            source=decode(old),
            result=decode(new),
            distinct_source=distinct(old),
            distinct_result=distinct(new),
            loop_source=find_loop(old),
            loop_result=find_loop(new),
            domain=domain or None,
        )
