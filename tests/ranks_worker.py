"""One of several ranks that make results of tiny models, stage by stage: test_ranks.py starts them.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=1234 python ranks_worker.py cases.json
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from se_compress.artifacts import ALONE, Ranks, RunOptions, to_json
from se_compress.compression import experts as solver_blocks
from se_compress.compression.execute import compress
from se_compress.errors import SeCompressError
from se_compress.model import experts as model_blocks
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.profiling.profiler import profile_experts
from se_compress.recipe import parse_recipe
from se_compress.running.ranks import dismiss, follow, join
from se_compress.validation.validator import validate


@contextmanager
def small_blocks() -> Iterator[None]:
    """Tiny models have several blocks a layer in here."""
    before = model_blocks.BLOCK_EXPERTS, solver_blocks.BLOCK_EXPERTS
    model_blocks.BLOCK_EXPERTS, solver_blocks.BLOCK_EXPERTS = 3, {"cpu": 2, "cuda": 2}
    try:
        yield
    finally:
        model_blocks.BLOCK_EXPERTS, solver_blocks.BLOCK_EXPERTS = before


@small_blocks()
def make(case: dict[str, Any], directory: Path, ranks: Ranks = ALONE) -> None:
    """The result of a case, with what was measured of it beside the weights; or its error.

    A case has `recipe`, `tokens` and `held_out`; `notices` lists what is told.
    """
    directory.mkdir(parents=True)
    notices: list[str] = []
    options = RunOptions(batch_tokens=64, ranks=ranks, notice=notices.append)
    recipe = parse_recipe(case["recipe"], "case")
    try:
        source = open_source(recipe.model)
        profile = profile_experts(source, case["tokens"], recipe, options)
        (directory / "profile.json").write_text(to_json(profile))
        plan = make_plan(source, profile, recipe)
        compress(source, plan, case["tokens"], recipe, directory, options)
        report = validate(source, plan, directory, case["held_out"], recipe, options, reload=False)
        (directory / "validation.json").write_text(to_json(report))
    except SeCompressError as error:
        (directory / "error.txt").write_text(f"{type(error).__name__}: {error}")


def main() -> int:
    ranks = join()
    if ranks.rank:
        with small_blocks():
            return follow(ranks)
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        make(case, Path(sys.argv[2]) / name, ranks)
    dismiss(ranks, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
