"""Batches of token ids, and the hidden states made of them: cut, saved and loaded again.

B sequences of a batch, T positions, H channels. A batch has neither padding nor sequences of
different lengths. Hidden states have the model's dtype and device.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from se_compress.model.store import IN_MEMORY, Store

# Positions whose logits are in memory at once; at 150,000 words that is 150 MB in float32.
PIECE_TOKENS = 256


@dataclass(frozen=True)
class States:
    """One batch on its way through the model, behind some layer, or before the first one.

    tokens  token ids, int64 [B, T]
    stream  the residual stream, [B, T, H]; [B, T, n, H / n] where a model has n side by side
    beside  what a layer hands to the next one besides, [B, T, ...] each; nothing in most models
    """

    tokens: Tensor
    stream: Tensor
    beside: tuple[Tensor, ...] = ()

    @property
    def hidden(self) -> Tensor:
        """The stream as [B, T, H], whatever it is made of: a view."""
        return self.stream.flatten(2)

    @property
    def handed_on(self) -> Any:
        """What the layer returned: the stream, or a tuple of it and what goes beside it."""
        return (self.stream, *self.beside) if self.beside else self.stream

    def behind(self, output: Any) -> "States":
        """The same batch behind a layer that returned `output`."""
        stream, *beside = output if isinstance(output, tuple) else (output,)
        return States(self.tokens, stream, tuple(beside))

    def kept_in(self, store: Store) -> "States":
        """The same, kept there."""
        beside = tuple(map(store.put, self.beside))
        return States(self.tokens, store.put(self.stream), beside)

    def cut(self, sequences: slice = slice(None), positions: slice = slice(None)) -> "States":
        """Some sequences, and some positions of them: views."""
        tokens, stream, *beside = (
            part[sequences, positions] for part in (self.tokens, self.stream, *self.beside)
        )
        return States(tokens, stream, tuple(beside))

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.tokens.shape[1]


def hidden_of(batches: Sequence[States]) -> list[Tensor]:
    """Hidden states [B, T, H] of each batch."""
    return [states.hidden for states in batches]


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


def leading(batches: Sequence[States], tokens: int) -> list[States]:
    """The first sequences of all batches: at most `tokens` tokens, but one sequence.

    The batches that are left are views of those given.
    """
    kept: list[States] = []
    for states in batches:
        count = min(len(states), tokens // states.length)
        if count or not kept:
            kept.append(states.cut(slice(max(1, count))))
        tokens -= max(1, count) * states.length
        if count < len(states):
            break
    return kept


def in_pieces(batches: Sequence[States]) -> list[States]:
    """The same states as views of one sequence and at most PIECE_TOKENS positions, in order.

    Logits are wide. What is computed from them position by position need not hold a batch of them.
    """
    return [
        states.cut(slice(row, row + 1), slice(start, start + PIECE_TOKENS))
        for states in batches
        for row in range(len(states))
        for start in range(0, states.length, PIECE_TOKENS)
    ]


# ------------------------------------------------------------------------------------------- resume


def save_states(path: Path, layer: int, streams: dict[str, list[States]]) -> None:
    """Write the states after `layer`, atomically: the file is the old one or the new one.

    streams  name -> states of each batch
    """
    from safetensors.torch import save_file

    tensors = {
        # The format takes no two tensors of one memory, and streams share their tokens.
        f"{name}.{index}.{part}": tensor.contiguous() if part else tensor.clone()
        for name, batches in streams.items()
        for index, states in enumerate(batches)
        for part, tensor in enumerate((states.tokens, states.stream, *states.beside))
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
    path: Path,
    device: torch.device,
    notice: Callable[[str], None],
    store: Store = IN_MEMORY,
) -> tuple[int, dict[str, list[States]]]:
    """The layer and the streams that `save_states` has written, on `device`, kept in
    a store.

    Layer -1 and no stream if there is no file. The same, with a word to `notice`, if the file is
    not what was saved.
    """
    from safetensors import SafetensorError

    if not path.exists():
        return -1, {}
    try:
        return _read_states(path, device, store)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        notice(f"{path} is damaged ({reason}): its stage starts again")
        return -1, {}


def _read_states(
    path: Path, device: torch.device, store: Store
) -> tuple[int, dict[str, list[States]]]:
    """As `load_states`, but raises one of many errors if the file is not what was saved."""
    from safetensors import safe_open

    parts: dict[tuple[str, int], list[Tensor]] = {}
    with safe_open(path, "pt") as file:
        metadata = cast(dict[str, str], file.metadata())
        sums = json.loads(metadata["checksums"])
        if metadata["file"] != path.name or sorted(file.keys()) != sorted(sums):
            raise ValueError("holds other states than it should")
        # Keys are "stream.batch.part": by numbers, as text would put 10 before 2.
        for name, batch, part in sorted(_key(key) for key in sums):
            key = f"{name}.{batch}.{part}"
            states = file.get_tensor(key)
            if _checksum(states) != sums[key]:
                raise ValueError(f"the checksum of {key} is wrong")
            parts.setdefault((name, batch), []).append(states.to(device))
    streams: dict[str, list[States]] = {}
    for (name, _), (tokens, stream, *beside) in parts.items():
        streams.setdefault(name, []).append(States(tokens, stream, tuple(beside)).kept_in(store))
    return int(metadata["layer"]), streams


def _key(text: str) -> tuple[str, int, int]:
    name, batch, part = text.split(".")
    return name, int(batch), int(part)
