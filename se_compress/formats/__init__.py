"""The file formats that we write, each one file: what it stores, its settings, packing, unpacking.

A new one is a file like its neighbours, a line in FORMATS, a word in `Format` and a row for each
engine that loads it (artifacts/targets.py), and how that engine reads the settings
(engines/engine_view.py). No module of this folder imports torch before it packs.
"""

from collections.abc import Mapping

from se_compress.formats.auto_round import AUTO_ROUND, AUTO_ROUND_GPTQ
from se_compress.formats.base import Format
from se_compress.formats.bitsandbytes import BITSANDBYTES
from se_compress.formats.compressed_tensors import COMPRESSED_TENSORS
from se_compress.formats.gptq import GPTQ, GPTQ_V2
from se_compress.formats.planned import Making, PlannedTensor, StoredPart

# Of a plan that quantises nothing; it has no row in FORMATS.
UNQUANTISED = "source"
FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (GPTQ, GPTQ_V2, AUTO_ROUND, AUTO_ROUND_GPTQ, COMPRESSED_TENSORS, BITSANDBYTES)
}

__all__ = ["FORMATS", "UNQUANTISED", "Format", "Making", "PlannedTensor", "StoredPart"]
