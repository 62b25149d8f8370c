"""Hidden states may lie in files: the same values, and nothing is left of the files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import random_tokens

from se_compress.errors import ResourceError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.observers import RoutingCapture
from se_compress.model.states import States, batches_of, load_states, save_states
from se_compress.model.store import IN_MEMORY, Store
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source

TinyType = Callable[[str], Path]
BATCHES = batches_of([*random_tokens(3, 40), *random_tokens(1, 23, seed=1)], 80)


def test_a_tensor_keeps_its_values_dtype_and_shape(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.arange(24).view(2, 3, 4).to(dtype)
        kept = store.put(tensor)
        assert torch.equal(kept, tensor)
        assert kept.dtype == dtype
        assert kept.data_ptr() != tensor.data_ptr()
        kept.add_(1)
        assert torch.equal(kept, tensor + 1)
    rows = [torch.randn(2, 5), torch.randn(0, 5), torch.randn(3, 5)]
    assert torch.equal(store.cat(rows), torch.cat(rows))
    assert store.empty((0, 5), rows[0]).shape == (0, 5)
    assert list(tmp_path.iterdir()) == []
    assert IN_MEMORY.put(tensor) is tensor


def test_a_place_for_files_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot be kept in .*gone: No such file"):
        Store(tmp_path / "gone").put(torch.zeros(3))


def _anonymous() -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_what_lies_in_files_is_no_memory_of_the_process(tmp_path: Path) -> None:
    like, megabytes = torch.zeros(1, dtype=torch.uint8), 64
    before = _anonymous()
    kept = Store(tmp_path).empty((megabytes * 2**20,), like).fill_(1)
    assert _anonymous() - before < 2**10 * megabytes / 4
    in_memory = IN_MEMORY.empty((megabytes * 2**20,), like).fill_(1)
    assert _anonymous() - before > 2**10 * megabytes / 2
    assert torch.equal(kept, in_memory)


# A shared expert; routed outputs that enter the stream in another way; streams side by side.
@pytest.mark.parametrize("name", ["qwen2_moe", "cohere2_moe", "deepseek_v4", "jamba"])
def test_a_model_runs_on_them_as_ever(tiny_type: TinyType, tmp_path: Path, name: str) -> None:
    source = open_source(str(tiny_type(name)))
    read = open_tensors(source.tensors)
    models = [StreamedModel(source, read, store=store) for store in (IN_MEMORY, Store(tmp_path))]
    states = [model.embed(BATCHES) for model in models]
    for layer in range(source.layer_count):
        captures = [RoutingCapture(), RoutingCapture()]
        states = [
            model.run_layer(layer, model.load_layer(layer), before, capture)
            for model, before, capture in zip(models, states, captures, strict=True)
        ]
        if captures[0].saw_experts:
            for part in ("hidden", "shared_hidden", "experts", "weights"):
                assert torch.equal(*(getattr(capture, part) for capture in captures))
    for ours, theirs in zip(
        *(m.logits(s) for m, s in zip(models, states, strict=True)), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_taken_up_into_files(tmp_path: Path) -> None:
    states = [States(torch.arange(6).view(2, 3), torch.randn(2, 3, 4), (torch.randn(2, 3, 1),))]
    save_states(tmp_path / "states", 4, {"source": states})
    (tmp_path / "files").mkdir()
    device, store = torch.device("cpu"), Store(tmp_path / "files")
    layer, streams = load_states(tmp_path / "states", device, pytest.fail, store)
    assert layer == 4
    assert torch.equal(streams["source"][0].stream, states[0].stream)
    assert torch.equal(streams["source"][0].beside[0], states[0].beside[0])
