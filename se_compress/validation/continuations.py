"""Greedy continuations of both models, and the gates on repetition and loops in them."""

from collections.abc import Iterator, Sequence

import torch

from se_compress.artifacts import Check, Continuation, ModelSource, RunOptions
from se_compress.model.measures import distinct, find_loop
from se_compress.model.streaming import StreamedModel
from se_compress.recipe import Validation
from se_compress.validation.checks import judged, not_judged
from se_compress.validation.side_by_side import Original


def continue_both(
    original: Original, result: StreamedModel, validation: Validation, options: RunOptions
) -> tuple[tuple[Continuation, ...], tuple[Check, Check]]:
    """Both models go on with the beginnings of some held-out sequences, spread over all of them."""
    wanted, tokens = validation.generation, original.tokens
    if not wanted.tokens:
        reason = "validation.generation.tokens is 0"
        repetition = not_judged(validation, "repetition", reason)
        return (), (repetition, not_judged(validation, "loops", reason))
    step = max(1, len(tokens) // wanted.prompts)
    prompts = torch.tensor([s[: wanted.prompt_tokens] for s in tokens[::step][: wanted.prompts]])
    steps = _steps("generate", 2 * wanted.tokens, options)
    source_ids = original.generate(prompts, wanted.tokens, lambda: next(steps))
    result_ids = result.generate(prompts, wanted.tokens, lambda: next(steps)).tolist()
    continuations = _continuations(original.model.source, prompts.tolist(), source_ids, result_ids)
    return continuations, _repetition_checks(source_ids, result_ids, validation)


def _steps(stage: str, total: int, options: RunOptions) -> Iterator[None]:
    for done in range(1, total + 1):
        options.progress(stage, done, total)
        yield


def _repetition_checks(
    source_ids: Sequence[Sequence[int]], result_ids: Sequence[Sequence[int]], validation: Validation
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
    source: ModelSource,
    prompts: Sequence[Sequence[int]],
    source_ids: Sequence[Sequence[int]],
    result_ids: Sequence[Sequence[int]],
) -> tuple[Continuation, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=False
    )
    return tuple(
        Continuation(
            prompt=str(tokenizer.decode(list(prompt))),
            source=str(tokenizer.decode(list(old))),
            result=str(tokenizer.decode(list(new))),
            distinct_source=distinct(old),
            distinct_result=distinct(new),
            loop_source=find_loop(old),
            loop_result=find_loop(new),
        )
        for prompt, old, new in zip(prompts, source_ids, result_ids, strict=True)
    )
