"""What processes.py forks warm processes from: all that a run imports, imported."""

import os
import sys
from collections.abc import Mapping, Sequence

import safetensors.torch  # noqa: F401
import torch.distributed  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import se_compress.compression.execute
import se_compress.profiling.profiler
import se_compress.validation.validator  # noqa: F401
from se_compress import cli


def run(argv: Sequence[str], environment: Mapping[str, str], stderr: str) -> None:
    """Be the command line in a process that was just forked, with its stderr in a pipe."""
    os.setsid()
    os.environ.update(environment)
    pipe, nowhere = os.open(stderr, os.O_WRONLY), os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.dup2(pipe, 2)
    os.close(pipe)
    # what they know of a file that is gone is not true of a pipe
    sys.stdout, sys.stderr = (open(fd, "w", closefd=False, encoding="utf-8") for fd in (1, 2))
    sys.argv = list(argv)
    cli.main()
