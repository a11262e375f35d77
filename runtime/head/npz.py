"""Arrays from .npz and .npy files of strangers: sizes are read from the headers before anything is unpacked."""
import io
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy

from caphuman_edge.runtime.errors import CapHumanError

Stream = IO[bytes] | io.BufferedIOBase  # zipfile's streams are the latter, whatever it says
MAX_NUMBERS = 1 << 26  # in one file; FLAME with its texture takes 13 million
# What numpy and zipfile were seen to raise on damaged archives: they share no base class.
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError,
          NotImplementedError, OverflowError, MemoryError, BadZipFile, zlib.error, struct.error)


class Header(NamedTuple):
    """What an .npy file says of its array."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def numbers(self) -> int:
        """How many numbers it claims to hold; a character counts as one."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype.kind in "SUV" else 1)


@contextmanager
def opened(path: Path, kind: type[CapHumanError], what: str) -> Iterator[ZipFile]:
    """An .npz file as the archive it is; what is wrong in it becomes `kind`, one line that says `what` it is not."""
    try:
        with ZipFile(path) as archive:
            check_packing(archive)
            yield archive
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise kind(f"{path} is no {what}, or is damaged ({reason}); fetch or make it again") from error


def check_packing(archive: ZipFile) -> None:
    """Raise ValueError for bzip2 and LZMA: of those zipfile unpacks gigabytes for the first byte that is asked for."""
    if any(member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for member in archive.infolist()):
        raise ValueError("it is packed in a way that numpy and torch never use")


def names(archive: ZipFile) -> set[str]:
    """The arrays that an .npz file holds."""
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def read_header(file: Stream) -> Header:
    """Read the header of an .npy file, up to its first number. Raises ValueError for a damaged one.

    Later versions of the format are for headers of over 64 KiB; numpy unpacks gigabytes where one claims to have them.
    """
    version = npy.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the .npy format")
    return Header(*npy.read_array_header_1_0(file))


def read_headers(archive: ZipFile, wanted: Iterable[str]) -> dict[str, Header]:
    """The headers of these arrays. Raises ValueError where they claim more than any head has."""
    headers = {}
    for name in wanted:
        with archive.open(f"{name}.npy") as file:
            headers[name] = read_header(file)
    total = sum(header.numbers for header in headers.values())
    lengths = [length for header in headers.values() for length in header.shape]
    if total > MAX_NUMBERS or not all(0 <= length <= MAX_NUMBERS for length in lengths):
        raise ValueError(f"it claims to hold {total} numbers in lengths of {min(lengths)} to {max(lengths)}, at most "
                         f"{MAX_NUMBERS} are read")
    return headers


def read_arrays(archive: ZipFile, wanted: Iterable[str]) -> dict[str, np.ndarray]:
    """These arrays, once their headers are found sane; pickled objects are refused."""
    arrays = {}
    for name in read_headers(archive, wanted):
        with archive.open(f"{name}.npy") as file:
            arrays[name] = np.asarray(npy.read_array(file, allow_pickle=False))
    return arrays
