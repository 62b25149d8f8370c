"""The gates on weights: every matrix that may have changed, beside what it was made from."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from se_compress.artifacts import Check, RunOptions, TensorInfo
from se_compress.model.checkpoint import Reader
from se_compress.model.measures import row_products
from se_compress.recipe import Validation
from se_compress.validation.checks import judged, sortable

# A matrix below this share of its kind's usual norm is judged by what the model does alone.
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the result beside what it was made from. `kind` is its projection; `cosine` is
    None if it was zero and still is; `before` and `after` are Frobenius norms."""

    name: str
    layer: int | None
    kind: str
    cosine: float | None
    spread: float
    before: float
    after: float


def weight_checks(
    changed: Iterable[TensorInfo],
    intended: Reader,
    read: Reader,
    validation: Validation,
    options: RunOptions,
) -> tuple[Check, Check]:
    """Every matrix that may have changed, beside what it was made from. One that was next to
    nothing and still is has lost nothing, whatever its direction: the grid, whose least scale is
    that of float16, may round it to zero."""
    compared = [info for info in changed if len(info.shape) == 2]
    matrices = []
    for done, info in enumerate(compared):
        options.progress("weights", done, len(compared))
        before, after = intended(info.name).float(), read(info.name).float()
        matrices.append(_compare_matrix(info, before, after))
    options.progress("weights", len(compared), len(compared))
    usual = _usual_norms(matrices)
    large = [m for m in matrices if max(m.before, m.after) > NEGLIGIBLE * usual[m.kind]]
    left_out = sum(m.before > 0 for m in matrices) - sum(m.before > 0 for m in large)
    return _cosine_check(large, left_out, validation), _gain_check(large, validation)


def _cosine_check(matrices: Iterable[_Matrix], left_out: int, validation: Validation) -> Check:
    """Of the matrix that points least the same way. `left_out` counts those that are not here."""
    cosines = [(m.cosine, m.name) for m in matrices if m.cosine is not None]
    least, name = min(cosines, key=lambda pair: sortable(pair[0]), default=(1.0, ""))
    details = (f"least in {name}" if least < 1.0 or math.isnan(least) else "", _left_out(left_out))
    return judged(validation, "weight_cosine", least, "; ".join(filter(None, details)))


def _gain_check(matrices: Iterable[_Matrix], validation: Validation) -> Check:
    """Of the kind of matrices in a layer whose rows lost their sizes most."""
    spreads = defaultdict[tuple[int | None, str], list[float]](list)
    for matrix in matrices:
        spreads[matrix.layer, matrix.kind].append(matrix.spread)
    of_kind = {key: median(values) for key, values in spreads.items()}
    worst = max(of_kind, key=lambda key: sortable(of_kind[key], math.inf), default=None)
    most = of_kind[worst] if worst else 0.0
    detail = f"most in {worst[1]} of layer {worst[0]}" if worst and most else ""
    return judged(validation, "weight_gain", most, detail)


def _compare_matrix(info: TensorInfo, before: Tensor, after: Tensor) -> _Matrix:
    found = row_products(before, after)
    cosine, sizes = found.cosine, (found.source_norm, found.result_norm)
    if cosine is None and sizes[1] > 0:
        cosine = 0.0  # something came out of nothing
    kind = info.name.removesuffix(".weight").rpartition(".")[2]
    return _Matrix(info.name, info.layer, kind, cosine, found.gain_spread, *sizes)


def _usual_norms(matrices: Iterable[_Matrix]) -> dict[str, float]:
    """By kind, over all layers: the upper quartile, so that neither a few large ones nor a
    majority that is next to nothing decide it."""
    norms = defaultdict[str, list[float]](list)
    for matrix in matrices:
        norms[matrix.kind].append(matrix.before)
    return {kind: sorted(sizes)[3 * (len(sizes) - 1) // 4] for kind, sizes in norms.items()}


def _left_out(count: int) -> str:
    return f"{count} of less than {NEGLIGIBLE:.0%} of the usual size are left out" if count else ""
