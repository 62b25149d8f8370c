"""What a file format has to say of itself. Each one is a file of this folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from se_compress.artifacts import Scheme
from se_compress.formats.planned import PlannedTensor, StoredPart

if TYPE_CHECKING:  # planning reads formats, and needs no torch
    from torch import Tensor

    from se_compress.quant.grid import Grid
    from se_compress.quant.packing import Codes

Parts = Iterator[StoredPart]


@dataclass(frozen=True)
class Format:
    """How files of one format store quantised matrices, R rows by C columns.

    name         in recipes and plans
    suffixes     what may follow a module's name, the codes first
    parts        (R, C, bits, scheme) -> what is stored of one matrix
    settings     (the linears of a result, scheme, the commonest width) -> `quantization_config`
    unpack       (parts, (R, C), scheme) -> float32 [R, C]
    pack         (codes uint8 [R, C], scales float32 [R, G], zeros uint8 [R, G], grid) -> parts;
                 None for a format whose library quantises by itself
    quantize     (weight [R, C], scheme) -> parts, of such a library
    scale_dtype  in which an engine holds scales, whatever the file has; None if the grid has none
    quant_method what config.json calls it
    layout       what config.json says beside that of a file that is read without a plan of ours;
                 "" if such a file is not read
    engine       what loads such a file
    package      what transformers needs to unpack it
    extra        of ours, that brings the package
    has_float32  whether its linears compute in float32 under transformers
    own_file     of the engine's own that holds the settings as well; "" if config.json alone does
    codes        (parts, columns) -> codes, scales and zeros of one matrix; None for a format whose
                 scales cannot be tuned
    """

    name: str
    suffixes: tuple[str, ...]
    parts: Callable[[int, int, int, Scheme], Parts]
    settings: Callable[[Sequence[PlannedTensor], Scheme, int], dict[str, Any]]
    unpack: "Callable[[Mapping[str, Tensor], tuple[int, int], Scheme], Tensor]"
    pack: "Callable[[Tensor, Tensor, Tensor, Grid], dict[str, Tensor]] | None"
    quantize: "Callable[[Tensor, Scheme], dict[str, Tensor]] | None"
    scale_dtype: Literal["float16", "bfloat16"] | None
    quant_method: str
    layout: str
    engine: str
    package: str
    extra: str
    has_float32: bool
    own_file: str = ""
    codes: "Callable[[Mapping[str, Tensor], int], Codes] | None" = None


def groups_of(columns: int, scheme: Scheme) -> int:
    """Groups of a row; -1 is one group."""
    return 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
