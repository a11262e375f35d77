"""Memory that a process holds without need: pages of weight files that a runtime has rearranged, and freed blocks.

A runtime that maps a file of weights reads it once, to arrange the numbers as its kernels want them. The file's pages
then still count as the process's memory, weights twice over, until the system takes them back under pressure. They are
clean, so they may be dropped at any time: who reads them again gets them from the file. Only Linux tells what is mapped
where; elsewhere these functions do nothing.
"""
import ctypes
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

PERIOD = 0.05  # seconds
MAPS = Path("/proc/self/maps")


@contextmanager
def dropping_pages(folders: Sequence[Path]) -> Iterator[None]:
    """Within the block, drop pages of files under these folders again and again as they are read."""
    if not MAPS.exists():
        yield
        return
    done = Event()
    thread = Thread(target=_drop_until, args=(folders, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def drop_pages(folders: Sequence[Path]) -> None:
    """Drop what is in memory of files under these folders that are mapped for reading alone."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, length in _mapped(folders):
        libc.madvise(start, length, mmap.MADV_DONTNEED)  # fails where it was unmapped since


def give_back() -> None:
    """Return freed blocks to the system, which glibc keeps for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _drop_until(folders: Sequence[Path], done: Event) -> None:
    while not done.wait(PERIOD):
        drop_pages(folders)
    drop_pages(folders)


def _mapped(folders: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Address and length of each mapping that nobody can have written to; of others the pages may be the only copy."""
    roots = [f"{folder.resolve()}/" for folder in folders]
    for line in MAPS.read_text().splitlines():
        place, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and rights.startswith("r-") and path[0].startswith(tuple(roots)):
            start, end = (int(address, 16) for address in place.split("-"))
            yield start, end - start
