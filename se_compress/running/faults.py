"""What the system and the libraries refuse in the middle of the work, told as errors of ours."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from se_compress.errors import ResourceError, SeCompressError, SourceError
from se_compress.running.places import partial, rejected

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Rust libraries give the number in the text only, and torch has no class for a full memory. The
# last words are those of the loader of shared libraries, where `ulimit -v` has no room for torch.
_FULL_IN_RUST = re.compile(rf"\(os error ({'|'.join(map(str, FULL))})\)")
_OUT_OF_MEMORY = re.compile(
    r"an't allocate memory|annot allocate memory|CUDA out of memory"
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
    text = str(error)
    full = isinstance(error, OSError) and error.errno in FULL
    if full or _FULL_IN_RUST.search(text):
        return ResourceError(f"the disk is full ({text}); progress is kept")
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return ResourceError("memory is exhausted; lower calibration.samples; progress is kept")
    return None
