"""Distill: tune a finished result as a whole on what the source predicts.

Once all layers are made, few of the result's numbers are still free: the scales of its packed
experts, routers and norms of a model that lost some. They are trained together, through the whole
model in memory, on the KL divergence from the source's predictions of the calibration text
(teacher.py). Codes and everything else stay as they are, and so does every byte's place.

Folds are those of refining (folds.py): gradients come from `tuning`, the state is chosen on
`selection`, and where none of those met is better than the start, nothing is changed. `report` says
how it went.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from se_compress.artifacts import DistillRecord, LayerRecord, RunOptions, TensorInfo
from se_compress.compression.folds import FOLDS, folds_of
from se_compress.compression.teacher import Predictions, predictions_of
from se_compress.compression.trained import Trained, norms_of, routers_of, scales_of
from se_compress.engines.blueprint import Blueprint
from se_compress.engines.distilling import parts_to_distill
from se_compress.errors import RecipeError
from se_compress.model.checkpoint import open_result
from se_compress.model.digests import by_owner, digest_of_tensor, digest_on_disk
from se_compress.model.whole import WholeModel, load_whole
from se_compress.recipe import Distill, Recipe

# Adam's step sizes at the start, falling to nothing; relative to each parameter's own size.
RATES: Mapping[str, float] = {"scales": 3e-3, "routers": 2e-2, "norms": 5e-3}
BETAS = (0.9, 0.99)
EPSILON = 1e-20  # a gradient is of one number of millions
LOOKS = 4  # how often the divergence on `selection` is measured
# Tokens whose gradients are computed at once, one sequence at least. Not what fits: their sums
# would differ in the last bit.
PIECE_TOKENS = 1024
# Of the products behind the gradients. What is measured is float32.
PRODUCTS = torch.bfloat16


@dataclass(frozen=True)
class Distilled:
    """What came of it.

    record   how it went
    tensors  those of the result that have changed, by their names there; none if it was undone
    """

    record: DistillRecord
    tensors: Mapping[str, Tensor]


def distill(
    blueprint: Blueprint,
    tokens: Sequence[Sequence[int]],
    recipe: Recipe,
    found: Mapping[str, TensorInfo],
    options: RunOptions,
) -> Distilled:
    """Train what the recipe wants of a result on disk; nothing is written.

    blueprint  of the result
    tokens     the calibration text, sequences of equal length
    found      headers of the result's files

    Raises RecipeError for sequences of several lengths.
    """
    rule, started = recipe.distill, time.perf_counter()
    assert rule is not None
    if len({len(sequence) for sequence in tokens}) != 1:
        raise RecipeError("distill: the calibration sequences are not of equal length")
    device, source = torch.device(options.device), blueprint.shrunk.original
    told = partial(options.progress, "distill")
    aim = predictions_of(source, tokens, device, options.work, told)
    read = open_result(found, blueprint.source.tensors, blueprint.plan.scheme, blueprint.names)
    model = load_whole(blueprint.source, read, device)
    trained = _trained(model, blueprint, found, rule)
    folds = folds_of(len(tokens))
    before = {fold: _divergence(model, aim, folds[fold]) for fold in FOLDS[1:]}
    best, step, kept = dict[str, Tensor](), 0, before
    looks = {round(rule.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    for done in _train(model, trained, aim, folds["tuning"], rule):
        told(done, rule.steps)
        if done in looks:
            now = {fold: _divergence(model, aim, folds[fold]) for fold in FOLDS[1:]}
            if now["selection"] < kept["selection"]:
                best, step, kept = _stored(trained), done, now
    record = DistillRecord(
        trained=tuple(dict.fromkeys(part.kind for part in trained)),
        step=step,
        selection_before=before["selection"],
        selection=kept["selection"],
        report_before=before["report"],
        report=kept["report"],
        covered=aim.covered,
        seconds=time.perf_counter() - started,
    )
    return Distilled(record, best)


def sentence_of(record: DistillRecord) -> str:
    """How distilling went, for the terminal."""
    what = " and ".join(record.trained)
    if not record.step:
        return (
            f"distilling {what} left the KL divergence from the source at "
            f"{record.selection_before:.4f} and was undone"
        )
    return (
        f"distilling {what}: on calibration text that had no say in it, the KL divergence from "
        f"the source went from {record.report_before:.4f} to {record.report:.4f}"
    )


def with_distilled(
    record: LayerRecord,
    blueprint: Blueprint,
    found: Mapping[str, TensorInfo],
    changed: Mapping[str, Tensor],
) -> LayerRecord:
    """The record of a layer with the tensors of it that were changed, and their hashes.

    found    headers of the result's files, where `changed` is by now
    changed  tensors of the result by name
    """
    stored = {
        slot.name: tensor for tensor in blueprint.of_layer(record.layer) for slot in tensor.stored
    }
    names = sorted(changed.keys() & stored.keys())
    if not names:
        return record
    # Hashes are kept by owner: those of all that an owner has are taken anew.
    made = {name for name, tensor in stored.items() if tensor.making != "copied"} | {*names}
    touched = by_owner(dict.fromkeys(names, "")).keys()
    owned = [name for name in made if by_owner({name: ""}).keys() <= touched]
    digests = {
        name: digest_of_tensor(changed[name]) if name in changed else digest_on_disk(found[name])
        for name in owned
    }
    return replace(record, digests={**record.digests, **by_owner(digests)}, distilled=tuple(names))


def _trained(
    model: WholeModel, blueprint: Blueprint, found: Mapping[str, TensorInfo], rule: Distill
) -> list[Trained]:
    kinds = parts_to_distill(blueprint, rule)
    parts: list[Trained] = []
    if "scales" in kinds:
        parts += scales_of(model, blueprint, found)
    if "routers" in kinds:
        parts += routers_of(model, blueprint)
    if "norms" in kinds:
        parts += norms_of(model, blueprint)
    return parts


def _stored(trained: Sequence[Trained]) -> dict[str, Tensor]:
    return {name: tensor for part in trained for name, tensor in part.stored().items()}


@torch.no_grad()
def _divergence(model: WholeModel, aim: Predictions, members: Sequence[int]) -> float:
    """From the source, mean over the positions of some sequences, one run at a time."""
    device = model.device
    each = [float(aim.divergence(model.logits(aim.tokens[[i]].to(device)), [i])) for i in members]
    return sum(each) / len(each)


def _train(
    model: WholeModel,
    trained: Sequence[Trained],
    aim: Predictions,
    members: Sequence[int],
    rule: Distill,
) -> Iterator[int]:
    """Take the steps on some sequences, and tell the number of each that is done. What was trained
    is in the live model then, rounded as it is stored."""
    groups = [{"params": [part.parameter], "rate": RATES[part.kind]} for part in trained]
    adam = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
    for step, chosen in enumerate(islice(_draws(members, rule.sequences), rule.steps)):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * (1 - step / rule.steps)
        model.forget_gradients()
        _add_gradients(model, aim, chosen)
        for part in trained:
            part.follow()
        adam.step()
        for part in trained:
            part.put()
        yield step + 1


def _add_gradients(model: WholeModel, aim: Predictions, chosen: Sequence[int]) -> None:
    """Of the mean divergence over some sequences, to what the live model's parameters have."""
    size = max(1, PIECE_TOKENS // aim.tokens.shape[1])
    for start in range(0, len(chosen), size):
        piece = chosen[start : start + size]
        products = torch.autocast(model.device.type, PRODUCTS, enabled=PRODUCTS != torch.float32)
        with torch.enable_grad():
            with products:
                logits = model.logits(aim.tokens[list(piece)].to(model.device))
            loss = aim.divergence(logits, piece) * (len(piece) / len(chosen))
            loss.backward()  # type: ignore[no-untyped-call]


def _draws(members: Sequence[int], size: int) -> Iterator[list[int]]:
    """`size` of the sequences at a time, without end; each once before any comes again, but the
    few that make no whole draw."""
    generator = torch.Generator().manual_seed(0)
    size = min(size, len(members))
    while True:
        order = torch.randperm(len(members), generator=generator).tolist()
        drawn = [members[i] for i in order]
        for start in range(0, len(drawn) - size + 1, size):
            yield drawn[start : start + size]
