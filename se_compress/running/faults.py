"""What the system and the libraries refuse in the middle of the work, told as errors of ours.

Where a library has a class or a number for it, that tells; here alone words do, of those that have
neither.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from se_compress.errors import ResourceError, SeCompressError, SourceError
from se_compress.running.places import partial, rejected

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Shortage = Literal["memory", "disk"]
# safetensors and tokenizers, written in Rust, give the number in their text only. Of a CPU's memory
# torch raises a bare RuntimeError. The last words are those of the loader of shared libraries,
# where `ulimit -v` has no room for torch.
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")
_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_OUT_OF_MEMORY = re.compile(
    r"an't allocate memory|annot allocate memory|out of memory"
    r"|failed to map segment from shared object(?!: Operation not permitted)"
)


@contextmanager
def telling_whose(model: Path, output: Path) -> Iterator[None]:
    """A file that cannot be used is told with whose it is: the model's or the output's.

    A full disk passes through: `foreseen` has a message for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL or not isinstance(error.filename, str | Path):
            raise
        file = Path(error.filename).absolute()
        if file.is_relative_to(model.absolute()):
            problem = f"{file}: cannot be read any more ({error.strerror}); the model has changed"
            raise SourceError(problem) from None
        places = (output, partial(output), rejected(output))
        if any(file.is_relative_to(place.absolute()) for place in places):
            raise ResourceError(f"output {file}: {error.strerror}; progress is kept") from None
        raise


def foreseen(error: Exception) -> SeCompressError | None:
    """What a library's error means to the user. None if it is a bug."""
    what = shortage(error)
    if what == "disk":
        return ResourceError(f"the disk is full ({error}); progress is kept")
    if what == "memory":
        return ResourceError("memory is exhausted; lower calibration.samples; progress is kept")
    return None


def shortage(error: BaseException) -> Shortage | None:
    """What this machine has run out of, if that is what an error of any library says."""
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _RUST_NUMBER.search(text)):
        number = int(found[1])
    if number in FULL or _FULL.search(text):
        return "disk"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _OUT_OF_MEMORY.search(text):
        return "memory"
    return None
