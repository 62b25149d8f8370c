"""What a run says that it takes, before it begins, is what it takes."""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from se_compress.compression import experts as solving
from se_compress.compression import layer
from se_compress.model import experts as loading
from se_compress.model import states
from se_compress.opening.source import open_source
from se_compress.recipe import load_recipe
from se_compress.running import footprint
from se_compress.running.footprint import footprints, largest_stage
from se_compress.running.preflight import in_units

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import processes
import synthetic

# Hidden states are what most of this model's memory is for.
WIDE = replace(
    synthetic.SMALL,
    config={**synthetic.SMALL.config, "hidden_size": 512, "num_experts_per_tok": 2},
)
SAMPLES, LENGTH = 64, 256


def test_it_reckons_with_the_blocks_that_are_loaded() -> None:
    assert footprint.LOADED_ELEMENTS == loading.BLOCK_ELEMENTS
    assert footprint.LOADED_EXPERTS == loading.BLOCK_EXPERTS
    assert footprint.SOLVED_ELEMENTS == solving.BLOCK_ELEMENTS["cpu"]
    assert footprint.SOLVED_EXPERTS == solving.BLOCK_EXPERTS["cpu"]
    assert footprint.PIECE_TOKENS == states.PIECE_TOKENS
    assert footprint.WITNESS_TOKENS == layer.WITNESS_TOKENS


def test_tokens_cost_hidden_states_and_experts_nothing_beyond_a_block(
    tiny_model: Callable[[str], Path],
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    recipe = tiny.recipe(source.path)
    few, many = (largest_stage(source, recipe, tokens) for tokens in (10_000, 20_000))
    assert many.states == pytest.approx(2 * few.states, rel=0.1)
    assert many.layer == few.layer
    large = replace(source, expert_count=40_000)
    larger = replace(source, expert_count=80_000)
    sizes = [largest_stage(one, recipe, 10_000).size_bytes for one in (large, larger)]
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("policy", [{}, {"prune": {"fraction": 0.25}, "repair": True}])
def test_it_is_what_a_run_takes(tmp_path: Path, policy: Mapping[str, Any]) -> None:
    """Within a fifth, where a run takes most; anonymous memory of a process of its own."""
    model = synthetic.write_model(WIDE, tmp_path / "model")
    settings = processes.recipe_of(
        model,
        tmp_path / "out",
        SAMPLES,
        LENGTH,
        policy={"bits": 4, **policy},
        quantization={"method": "gptq", "group_size": 128},
    )
    file = processes.write_recipe(tmp_path / "recipe.yaml", settings)
    there = tmp_path / "states"
    there.mkdir()
    recipe = load_recipe(file)
    hashes = []
    for words in ((), ("--hidden-states", str(there))):
        seen = processes.watched(processes.command(0, file, *words))
        assert seen.code == 0, seen.said[-1:]
        source, tokens = open_source(str(model)), SAMPLES * LENGTH
        for one in footprints(source, recipe, tokens, bool(words))[:2]:
            size = footprint.LIBRARIES + one.size_bytes
            assert size == pytest.approx(seen.by_stage[one.stage], rel=0.2), (one, seen.by_stage)
        largest = largest_stage(source, recipe, tokens, bool(words))
        said = next(line for line in seen.said if line.startswith("memory: "))
        size = footprint.LIBRARIES + largest.size_bytes
        assert said.startswith(f"memory: {in_units(size)} at the most, in {largest.stage}: ")
        hashes.append(processes.hashes(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert hashes[0] == hashes[1]
    assert list(there.iterdir()) == []


def test_what_lies_in_files_costs_no_memory(tmp_path: Path) -> None:
    """Four times the tokens: a run without what they cost in memory."""
    model = synthetic.write_model(WIDE, tmp_path / "model")
    there, tokens = tmp_path / "states", 4 * SAMPLES * LENGTH
    there.mkdir()
    settings = processes.recipe_of(model, tmp_path / "out", 4 * SAMPLES, LENGTH)
    file = processes.write_recipe(tmp_path / "recipe.yaml", settings)
    words = ("--profile", "--hidden-states", str(there))
    seen = processes.watched(processes.command(0, file, *words))
    assert seen.code == 0, seen.said[-1:]
    profile, *_ = footprints(open_source(str(model)), load_recipe(file), tokens, on_disk=True)
    size = footprint.LIBRARIES + profile.size_bytes
    assert size == pytest.approx(seen.by_stage["profile"], rel=0.2), (profile, seen.by_stage)
