"""How much memory this process may still take: the machine's, the container's or the shell's limit.

The kernel kills a process beyond the limit of its control group however much the machine has left.
"""

import ctypes
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MACHINE = "of this machine"
SHELL = "within the limit on address space (ulimit -v)"
# Of mallopt(3), and the size from which what is freed goes back to the system at once.
_M_MMAP_THRESHOLD, AT_ONCE_BYTES = -3, 2**21


def give_back_at_once() -> None:
    """Have the C library give a tensor's memory back to the system when the tensor goes.

    glibc keeps what is freed, up to 32 MB a piece, and of pieces between others that stay little is
    used again: a process grows with the tensors that have passed, wherever they are now. The price
    is time, above all on small experts: the system hands memory out zeroed, page by page. Another C
    library is left as it is.
    """
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(_M_MMAP_THRESHOLD, AT_ONCE_BYTES)


@dataclass(frozen=True)
class Available:
    """Memory that may still be taken.

    limit   what bounds it, to follow "... of memory are available"
    """

    size_bytes: int
    limit: str


@dataclass(frozen=True)
class _Files:
    """The names of a control group's files in one version of the interface."""

    limits: tuple[str, ...]
    used: str
    cache: str


_VERSION_1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def available_memory(
    groups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self")
) -> Available:
    """The least of what all limits leave.

    What a control group holds of files that it has not used lately counts as free: the kernel drops
    it when memory is needed.

    groups   where the control groups are mounted
    process  the process whose groups and size count
    """
    import psutil

    machine = Available(int(psutil.virtual_memory().available), MACHINE)
    found = [machine, *_of_groups(groups, process), *_of_shell(process)]
    return min(found, key=lambda one: one.size_bytes)


def _of_groups(groups: Path, process: Path) -> Iterator[Available]:
    """What each group that the process is in leaves, and each group around it."""
    for mount, path, files in _memberships(groups, process):
        for directory in (path, *path.parents):
            left = _left(mount / str(directory).lstrip("/"), files)
            if left is not None:
                name = str(directory) if directory.name else "/"
                yield Available(left, f"within the memory limit of the control group {name}")


def _memberships(groups: Path, process: Path) -> Iterator[tuple[Path, Path, _Files]]:
    """Mount point, group and file names for each hierarchy that may limit memory.

    A container may see its group's path on the host, where only the root exists. `_left` passes
    over the rest.
    """
    for line in _text(process / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            yield groups / "memory", Path(path), _VERSION_1
        elif not controllers:
            yield groups, Path(path), _VERSION_2
            yield groups / "unified", Path(path), _VERSION_2


def _left(group: Path, files: _Files) -> int | None:
    """Bytes that a group leaves. None without a limit."""
    limits = [_number(_text(group / name)) for name in files.limits]
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    rows = [line.split() for line in _text(group / "memory.stat").splitlines()]
    cache = next((_number(row[1]) for row in rows if len(row) == 2 and row[0] == files.cache), 0)
    used = _number(_text(group / files.used)) or 0
    return max(0, min(known) - max(0, used - (cache or 0)))


def _of_shell(process: Path) -> Iterator[Available]:
    """What `ulimit -v` leaves, if it is set."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _number(_text(process / "statm").partition(" ")[0])
    if limit != resource.RLIM_INFINITY and pages is not None:
        yield Available(max(0, limit - pages * resource.getpagesize()), SHELL)


def _text(file: Path) -> str:
    """Text of a file of the kernel. "" without one: which exist depends on its version."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _number(text: str) -> int | None:
    """A number from such a file. None for "max", and for what is not there."""
    return int(text) if text.strip().isdecimal() else None
