"""Memory that a process holds without need: pages of weight files that a runtime has rearranged, and freed blocks.

A runtime that maps a file of weights reads it once, to arrange the numbers as its kernels want them. The file's pages
then still count as the process's memory, weights twice over, until the system takes them back under pressure. They are
clean, so they may be dropped at any time: who reads them again gets them from the file. Where the system does not tell
what is mapped, or takes no such advice, these functions do nothing.
"""
import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

PERIOD = 0.05  # seconds
MAPS = Path("/proc/self/maps")
DROP = getattr(mmap, "MADV_DONTNEED", None)
Range = tuple[int, int]  # address and length


@contextmanager
def dropping_pages(ranges: Iterable[Range]) -> Iterator[None]:
    """Within the block, drop the pages of these mappings again and again as they are read.

    The caller keeps them mapped until the end: else other memory might have come to lie there.
    """
    done, kept = Event(), tuple(ranges)
    if not kept or DROP is None:
        yield
        return
    thread = Thread(target=_drop_until, args=(kept, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def mapped_under(folder: Path) -> set[Range]:
    """The mappings of files in this folder that nobody can have written to; of others a page may be the only copy."""
    if not MAPS.exists():
        return set()
    rows = (line.split(maxsplit=5) for line in MAPS.read_text().splitlines())
    root = f"{folder.resolve()}/"
    places = [row[0].split("-") for row in rows if len(row) > 5 and row[1].startswith("r-") and row[5].startswith(root)]
    return {(int(start, 16), int(end, 16) - int(start, 16)) for start, end in places}


def give_back() -> None:
    """Return freed blocks to the system, which glibc keeps for later."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _drop_until(ranges: tuple[Range, ...], done: Event) -> None:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    while True:
        finished = done.wait(PERIOD)
        for start, length in ranges:
            advise(start, length, DROP)
        if finished:
            return
