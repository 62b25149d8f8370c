"""Batches of token ids, and the hidden states made of them: cut, saved and loaded again.

B sequences of a batch, T positions, H channels. A batch has neither padding nor sequences of
different lengths. Hidden states have the model's dtype and device.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

# Positions whose logits are in memory at once; at 150,000 words that is 150 MB in float32.
PIECE_TOKENS = 256


def batches_of(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[Tensor]:
    """Batches of neighbouring sequences of equal length: int64 [B, T] each, on the CPU.

    A batch has at most `batch_tokens` tokens, but at least one sequence.
    """
    batches: list[list[Sequence[int]]] = []
    for sequence in tokens:
        full = batches and (len(batches[-1]) + 1) * len(sequence) > batch_tokens
        if not batches or full or len(batches[-1][0]) != len(sequence):
            batches.append([])
        batches[-1].append(sequence)
    return [torch.tensor(batch) for batch in batches]


def leading(hidden: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """The first sequences of all batches [B, T, H]: at most `tokens` tokens, but one sequence.

    The batches that are left are views of those given.
    """
    kept: list[Tensor] = []
    for states in hidden:
        count = min(len(states), tokens // states.shape[1])
        if count or not kept:
            kept.append(states[: max(1, count)])
        tokens -= max(1, count) * states.shape[1]
        if count < len(states):
            break
    return kept


def in_pieces(hidden: Sequence[Tensor]) -> list[Tensor]:
    """The same states [B, T, H] as views [1, n, H] of at most PIECE_TOKENS positions, in order.

    Logits are wide. What is computed from them position by position need not hold a batch of them.
    """
    pieces: list[Tensor] = []
    for states in hidden:
        for sequence in states:
            pieces += torch.split(sequence[None], PIECE_TOKENS, dim=1)
    return pieces


# ------------------------------------------------------------------------------------------- resume


def save_states(path: Path, layer: int, streams: Mapping[str, Sequence[Tensor]]) -> None:
    """Write the hidden states after `layer`, atomically: the file is the old one or the new one.

    streams  name -> hidden states [B, T, H] of each batch
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{index}": states.contiguous()
        for name, batches in streams.items()
        for index, states in enumerate(batches)
    }
    partial = path.with_name(path.name + ".writing")
    sums = {key: _checksum(states) for key, states in tensors.items()}
    metadata = {
        "file": path.name,
        "layer": str(layer),
        "checksums": json.dumps(sums),
    }
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def _checksum(states: Tensor) -> int:
    """CRC-32 of the bytes of a tensor of any shape and dtype."""
    flat = states.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def load_states(
    path: Path, device: torch.device, notice: Callable[[str], None]
) -> tuple[int, dict[str, list[Tensor]]]:
    """The layer and the streams that `save_states` has written, on `device`.

    Layer -1 and no stream if there is no file. The same, with a word to `notice`, if the file is
    not what was saved.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return -1, {}
    try:
        return _read_states(path, device)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        notice(f"{path} is damaged ({reason}): its stage starts again")
        return -1, {}


def _read_states(path: Path, device: torch.device) -> tuple[int, dict[str, list[Tensor]]]:
    """As `load_states`, but raises one of many errors if the file is not what was saved."""
    from safetensors import safe_open

    streams: dict[str, list[Tensor]] = {}
    with safe_open(path, "pt") as file:
        metadata = cast(dict[str, str], file.metadata())
        sums = json.loads(metadata["checksums"])
        if metadata["file"] != path.name or sorted(file.keys()) != sorted(sums):
            raise ValueError("holds other states than it should")
        # Keys are "stream.batch": by number of the batch, as text would put 10 before 2.
        for key in sorted(sums, key=lambda k: (k.split(".")[0], int(k.split(".")[1]))):
            states = file.get_tensor(key)
            if _checksum(states) != sums[key]:
                raise ValueError(f"the checksum of {key} is wrong")
            streams.setdefault(key.split(".")[0], []).append(states.to(device))
    return int(metadata["layer"]), streams
