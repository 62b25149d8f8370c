"""Where hidden states are kept from layer to layer: in memory, or in files that are mapped into it.

What is mapped from a file is no memory of the process's own: the kernel writes it to disk when
memory is short, and reads it when it is used. The files have no name any more once they are mapped,
so nothing is left of them however a run ends. No value depends on where it is kept.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from se_compress.errors import ResourceError


@dataclass(frozen=True)
class Store:
    """Gives places for hidden states, and for what layers make of all of them.

    directory  of the files, on the CPU only; None: in memory, or on the device
    """

    directory: Path | None = None

    def empty(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor without values, on the device of another one, and of its dtype by default.

        Raises ResourceError if no such file can be made.
        """
        dtype = dtype or like.dtype
        if self.directory is None:
            return like.new_empty(shape, dtype=dtype)
        return self._mapped(math.prod(shape), dtype).view(*shape)

    def put(self, tensor: Tensor) -> Tensor:
        """The same values, kept here: a copy, or the tensor itself if this is memory."""
        return tensor if self.directory is None else self.empty(tensor.shape, tensor).copy_(tensor)

    def cat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of equal width below one another, kept here."""
        first, rows = tensors[0], sum(map(len, tensors))
        whole = self.empty((rows, *first.shape[1:]), first)
        torch.cat(list(tensors), out=whole)
        return whole

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor in a file of its own that nobody else can open."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory) as file:
                # Reserved, not only named: a full disk is an error here and not a signal later.
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        except OSError as error:
            raise ResourceError(
                f"hidden states cannot be kept in {self.directory}: {error.strerror}"
            ) from None


IN_MEMORY = Store()
