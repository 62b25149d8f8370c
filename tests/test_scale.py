"""The benchmarks that start the command line themselves: their models, watch and tables."""

import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny

from se_compress.opening.headers import read_headers
from se_compress.opening.source import open_source

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kills
import processes
import ranks
import scale
import synthetic

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
}
LATENT = {
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 2,
}


def small(shape: synthetic.Shape) -> synthetic.Shape:
    """The same kind of model, tiny."""
    own = LATENT if shape.family == "deepseek_v3" else {"head_dim": 16}
    return replace(shape, config={**shape.config, **SIZES, **own}, experts=16)


@pytest.mark.parametrize("shape", [synthetic.QWEN3_30B, synthetic.DEEPSEEK_V3])
def test_a_synthetic_model_is_one_that_transformers_loads_whole(
    shape: synthetic.Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "SHARD_BYTES", 200_000)
    directory = synthetic.write_model(small(shape), tmp_path / "model")
    assert len(list(directory.glob("*.safetensors"))) > 1
    source = open_source(str(directory))
    assert source.expert_count == 16
    assert len(source.moe_layers) == shape.layers - shape.dense
    assert tiny.plain_model(directory).config.num_hidden_layers == shape.layers
    found = read_headers(directory)
    layer = shape.layers - 1

    def weight(expert: int) -> bytes:
        info = found[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
        return Path(info.file).read_bytes()[info.begin : info.end]

    assert weight(0) == weight(synthetic.EXPERTS_DRAWN) != weight(1)
    before = (directory / "config.json").stat().st_mtime_ns
    synthetic.write_model(small(shape), directory)
    assert (directory / "config.json").stat().st_mtime_ns == before


def test_anonymous_memory_is_that_of_children_too_and_not_of_files(tmp_path: Path) -> None:
    before = processes.anonymous(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", "x = b'x' * 10**8; print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        grown = processes.anonymous(os.getpid()) - before
        assert 1e8 < grown < 1.5e8
        child.kill()
    fork = os.fork()
    if not fork:
        time.sleep(60)
        os._exit(0)
    try:
        assert processes.anonymous(os.getpid()) - before < 5e7
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10**8)
    before = processes.anonymous(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[at] for at in range(0, 10**8, 4096))
        assert processes.anonymous(os.getpid()) - before < 2e7


def test_what_takes_too_much_is_ended_and_said() -> None:
    grows = (
        "import sys, time; print('profile: 0/2 begins', file=sys.stderr, flush=True); "
        "x = b'x' * 4 * 10**8; time.sleep(60)"
    )
    seen = processes.watched([sys.executable, "-c", grows], most=2 * 10**8)
    assert seen.too_much
    assert seen.code == -9
    assert seen.peak > 2e8
    assert seen.by_stage["profile"] == seen.peak
    assert seen.said == ["profile: 0/2 begins"]
    ends = processes.watched([sys.executable, "-c", "raise SystemExit(3)"])
    assert (ends.code, ends.too_much) == (3, False)


def test_the_processes_that_work_are_found_below_their_launcher() -> None:
    works = [sys.executable, "-c", "input()", "se_compress"]
    launcher = f"import subprocess as s; p = s.Popen({works}, stdin=-1); print(p.pid); p.wait()"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", launcher],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            while b"se_compress" not in Path(f"/proc/{child}/cmdline").read_bytes():
                time.sleep(0.01)
            assert processes.members(process.pid) == [child]
        finally:
            processes.Group([process.pid], lambda seconds: None, iter(())).kill()


def result(directory: Path, weights: bytes) -> Path:
    (directory / "se_compress").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "README.md").write_text(str(time.time()))
    for name in ("profile.json", "plan.json", "compression.json"):
        (directory / "se_compress" / name).write_text("{}")
    return directory


def test_what_lies_under_the_name_is_the_earlier_result_or_the_new_one_whole(
    tmp_path: Path,
) -> None:
    kept, new = result(tmp_path / "kept", b"earlier"), result(tmp_path / "new", b"new")
    place = kills.Workplace(
        tmp_path / "recipe.yaml",
        tmp_path / "out",
        kept,
        processes.hashes(kept),
        processes.hashes(new),
        {"start": 1.0, "hash": 1.0},
    )
    place.begin_anew(earlier=False)
    assert place.found() == kills.NOTHING
    place.begin_anew(earlier=True)
    assert place.found() == kills.EARLIER
    (place.output / "README.md").write_text("another time")
    assert place.found() == kills.EARLIER
    (place.output / "model.safetensors").write_bytes(b"new")
    assert place.found() == kills.NEW
    (place.output / "se_compress" / "plan.json").unlink()
    assert place.found().startswith(f"{kills.HALF}: ")
    (place.output / "se_compress" / "plan.json").write_text("{}")
    (place.output / "model.safetensors").write_bytes(b"ne")
    assert place.found() == f"{kills.HALF}: model.safetensors"


def test_the_table_of_kills_counts_by_stage_and_names_what_went_wrong() -> None:
    aim = kills.Aim(2, "profile", 0.5, one=True)
    runs = [
        kills.Run(aim, "profile", -9, kills.NOTHING, ""),
        kills.Run(aim, "compress", 1, kills.EARLIER, ""),
        kills.Run(aim, "", 0, kills.NEW, ""),
    ]
    assert not any(run.wrong for run in runs)
    text = kills.report("tiny", [1, 2], 0, runs)
    assert "2 runs killed with SIGKILL, 1 came to their end: 1 of them with the bytes" in text
    assert "| profile | 1 | 1 | 0 | 0 | 0 |" in text
    assert "| compress | 1 | 0 | 1 | 0 | 0 |" in text
    for bad in (
        kills.Run(aim, "hash", -9, kills.HALF, ""),
        kills.Run(aim, "", 0, kills.EARLIER, ""),
        kills.Run(aim, "", 3, kills.NOTHING, "se-compress: what"),
    ):
        assert bad.wrong
        assert "- {" in kills.report("tiny", [1], 0, [bad])


def test_files_that_differ_between_numbers_of_ranks_are_named() -> None:
    found = {
        "gptq": {"0": {"a": "1", "b": "2"}, "2": {"a": "1", "b": "2"}},
        "rtn": {"0": {"a": "1"}, "2": {"a": "9", "c": "1"}},
        "nf4": {"0": {"a": "1"}},
    }
    differs = ranks.differences(found, [0, 2])
    assert differs["gptq"] == {"0": [], "2": []}
    assert differs["rtn"]["2"] == ["a", "c"]
    assert differs["nf4"]["2"] == ["no result"]
    kept = {"codes": {"0": 0, "2": 1}, "refused": {"x": "why"}, "variants": differs}
    text = ranks.report({"equal tiny": kept})
    assert "| rtn with 2: a, c; nf4 with 2: no result; 2 ranks: exit code 1 | x |" in text
    times = [{"whole": 10.0, "layers": 8.0, **dict.fromkeys(ranks.WORK_STAGES, 2.0)}]
    fast = [{"whole": 5.0, "layers": 4.0, **dict.fromkeys(ranks.WORK_STAGES, 1.6)}]
    ways = dict(zip(ranks.WAYS, (times, fast, times), strict=True))
    assert "each (1 rounds) | 5.0 (2.00) | 4.0 (2.00) | 1.6 (1.25) |" in ranks.report(
        {"speed smollm2-moe": ways}
    )


def test_growth_is_told_as_a_share_of_the_base() -> None:
    base = processes.Seen(0, 10.0, 10**9, {"profile": 10**9}, {"start": 0.5, "profile": 5.0})
    twice = replace(base, seconds=20.0, spent={"start": 0.5, "profile": 11.0})
    found = {
        name: {**asdict(seen), "stated": None, "made": True}
        for name, seen in {"base": base, "twice the experts": twice}.items()
    }
    text = scale.report(found)
    assert "| twice the experts | 20.0 | 2.00 | 1.00 GB | 1.00 | profile 2.20 |" in text
    said = processes.Seen(said=["memory: 1.50 GB at the most, for what"])
    assert scale.stated(said) == 1.5e9
    assert scale.stated(base) is None
