"""The numbers of a result as the Hub reads them from the head of its card: `model-index`."""

from collections.abc import Iterator, Sequence
from typing import Any

from se_compress.artifacts import DISTANCE, Tail, TextRecord, ValidationReport

# type, name: words that the Hub has for a metric, where it has one.
PERPLEXITY = ("perplexity", "perplexity")
DIVERGENCE = (DISTANCE, "KL divergence to the source, nats, mean over tokens")
DIVERGENCE_99 = (f"{DISTANCE}_99", "KL divergence to the source, nats, 99 % of the tokens below")
AGREEMENT = ("top_1_agreement", "tokens whose most likely one is the source's")
Metric = tuple[tuple[str, str], float]


def model_index(name: str, validation: ValidationReport) -> list[dict[str, Any]]:
    """What the key `model-index` of a card holds; empty if the result could not be run.

    name   of the result
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=dataset,
            metric_type=word,
            metric_name=title,
            metric_value=float(f"{value:.5g}"),
        )
        for (kind, dataset), metrics in (_measured(validation) | _tasks(validation)).items()
        for (word, title), value in metrics
    ]
    return eval_results_to_model_index(name, results) if results else []


def _measured(validation: ValidationReport) -> dict[tuple[str, str], Sequence[Metric]]:
    """(type of the data, its name) -> what was measured on it."""
    held_out = {one.domain: one for one in validation.texts if one.role == "held-out"}
    if validation.domains:
        return {
            _dataset(held_out.get(one.name), one.name): [
                (PERPLEXITY, one.perplexity_result),
                *_distances(one.distance, one.tail),
            ]
            for one in validation.domains
        }
    if validation.tail is None:
        return {}
    mean = validation.check(DISTANCE).value
    metrics = [(PERPLEXITY, validation.perplexity_result), *_distances(mean, validation.tail)]
    return {_dataset(held_out.get(""), ""): metrics}


def _tasks(validation: ValidationReport) -> dict[tuple[str, str], Sequence[Metric]]:
    """Share of the questions of each task that the result answers right."""
    return {
        (one.name, one.name): [((one.metric, f"{one.metric}, {one.samples} questions"), one.result)]
        for one in validation.tasks
    }


def _distances(mean: float | None, tail: Tail) -> Iterator[Metric]:
    if mean is not None:
        yield DIVERGENCE, mean
    yield DIVERGENCE_99, tail.p99
    yield AGREEMENT, tail.agreement


def _dataset(text: TextRecord | None, domain: str) -> tuple[str, str]:
    """Files bear their names alone: where they lie is nobody's business."""
    names = [source.rsplit("/", 1)[-1] for source in text.sources] if text else []
    named = f"{domain}: " if domain else ""
    return f"held-out-{domain or 'text'}", f"{named}{', '.join(names) or 'held-out text'}"
