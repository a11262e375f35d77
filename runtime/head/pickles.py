"""Arrays out of pickles that are not trusted: FLAME's models and landmark embeddings.

`pickle_machine` reads the file without running it; here its records become numpy arrays. Every size is compared with
the bytes that are there before anything is allocated, and all that is made together may not outgrow the file.
"""
import io
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.head.npz import DAMAGE, check_packing, read_header
from caphuman_edge.runtime.head.pickle_machine import CHUMPY, PERSISTENT, TORCH_STORAGES, Made, Name, load

MAX_FILE = 1 << 30  # bytes; FLAME 2020 has 53 MB
SPARE = 64 << 20  # bytes that arrays may take beyond twice the file's: sparse matrices are made dense
MAX_DEPTH = 16
NUMBERS = re.compile(r"[<>=|]?(?:b1|\?|[iu][1248]|f[248])")
OBJECTS = re.compile(r"[|]?O[48]?")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # opens torch's files from before 1.6, and pickled storages to this day
NPY_MAGIC = b"\x93NUMPY"


def read_pickle(path: Path, wanted: Iterable[str]) -> dict[str, Any]:
    """The `wanted` entries, as far as they are there, of the dictionary in a pickle or in a pickled .npy file.

    numpy, scipy.sparse, chumpy and torch objects become arrays; the rest is dicts, lists, tuples, strings, bytes and
    numbers. Nothing in the file is run. Raises CheckpointError for anything else that it holds, or a damaged file.
    """
    data = _bytes(path)
    file = io.BytesIO(data)
    try:
        if data.startswith(NPY_MAGIC) and not read_header(file).dtype.hasobject:
            raise ValueError("it holds plain numbers")
        values = _Values(str(path), 2 * len(data) + SPARE)
        content = values.unwrapped(load(file, str(path)))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return {name: values.of(content[name]) for name in wanted if name in content}
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{path} is no pickled dictionary of arrays, or is damaged ({reason}); fetch it again "
                              "from its official place") from error


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise CheckpointError(f"{path} has over {MAX_FILE >> 20} MiB, more than any head; check the path")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from error


class _Values:
    """Turns the records of one pickle into arrays, each record once; `left` bytes may still be made."""

    def __init__(self, source: str, left: int):
        self.source, self.left = source, left
        self.known: dict[int, Any] = {}  # by id of the record or container, all of which the pickle's value keeps
        self.makers = {
            "numpy.core.multiarray._reconstruct": self.array, "numpy.core.numeric._frombuffer": self.array_of_buffer,
            "numpy.core.multiarray.scalar": self.scalar, "numpy.dtype": self.dtype, "_codecs.encode": self.encoded,
            "builtins.bytes": self.no_bytes, "scipy.sparse.csc.csc_matrix": self.sparse,
            "scipy.sparse.csr.csr_matrix": self.sparse, "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch.storage._load_from_bytes": self.storage,
        }

    def unwrapped(self, value: Any) -> Any:
        """The object that numpy wraps in an array to save it as .npy."""
        if isinstance(value, Made) and value.name == "numpy.core.multiarray._reconstruct" and value.state[1] == ():
            (value,) = value.state[4]
        return value

    def of(self, value: Any, depth: int = 0) -> Any:
        """The plain value or array that a record stands for, and those in a container."""
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(value, Name):
            raise ValueError(f"it holds {value.full} itself")
        if not isinstance(value, (Made, list, tuple, dict)):
            return value
        if id(value) not in self.known:
            if isinstance(value, Made):
                self.known[id(value)] = self.made(value, depth + 1)
            elif isinstance(value, dict):
                self.known[id(value)] = {key: self.of(item, depth + 1) for key, item in value.items()}
            else:
                self.known[id(value)] = type(value)([self.of(item, depth + 1) for item in value])
        return self.known[id(value)]

    def made(self, record: Made, depth: int) -> Any:
        """One record's value."""
        if record.name.startswith(CHUMPY):
            return self.chumpy(record, depth)
        if record.name not in self.makers:
            raise ValueError(f"{record.name} is no array")
        return self.makers[record.name](record, depth)

    def spend(self, size: int) -> None:
        """Count bytes before they are made."""
        self.left -= size
        if self.left < 0:
            raise ValueError("its arrays are larger than the file")

    def raw(self, data: Any, depth: int) -> bytes | bytearray:
        """The bytes of an array; Python 2 wrote them as a string."""
        value = self.of(data, depth)
        if isinstance(value, str):
            self.spend(len(value))
            return value.encode("latin-1")
        if not isinstance(value, (bytes, bytearray)):
            raise ValueError(f"an array's numbers in a {type(value).__name__}")
        return value

    def encoded(self, record: Made, depth: int) -> bytes:
        """Bytes as Python 3 writes them in protocols 0 to 2."""
        text, codec = record.arguments
        if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
            raise ValueError("bytes in a foreign encoding")
        return bytes(self.raw(text, depth))

    def no_bytes(self, record: Made, depth: int) -> bytes:
        """No bytes at all, as Python 3 writes them in protocols 0 to 2."""
        if record.arguments:
            raise ValueError("bytes made of something else")
        return b""

    def dtype(self, record: Made, depth: int) -> np.dtype:
        """A type of plain numbers, or of objects; fields, subarrays and metadata are refused."""
        code, (_, order, subarray, names, fields, *_) = record.arguments[0], record.state or (3, "|", *[None] * 3)
        if not isinstance(code, str) or not (NUMBERS.fullmatch(code) or OBJECTS.fullmatch(code)):
            raise ValueError(f"numbers of type {ascii(code)[:40]}")
        if (subarray, names, fields) != (None, None, None) or order not in ("<", ">", "|", "="):
            raise ValueError("a type of several parts")
        return np.dtype(code).newbyteorder(order)

    def laid_out(self, shape: Any, dtype: Any, data: Any, order: str, depth: int) -> Any:
        """An array over bytes of just its size; an array of objects is the list of them."""
        if not isinstance(dtype, np.dtype) or not _is_shape(shape) or order not in ("C", "F"):
            raise ValueError("an array without a proper shape or type")
        if dtype.hasobject:
            items = self.of(data, depth)
            if not isinstance(items, list) or len(items) != math.prod(shape):
                raise ValueError(f"objects that do not fill {shape}")
            return items[0] if shape == () else items
        raw = self.raw(data, depth)
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {shape} {dtype} in {len(raw)} bytes")
        return np.ndarray(shape, dtype, raw, order="C" if order == "C" else "F")

    def array(self, record: Made, depth: int) -> Any:
        """numpy's arrays up to protocol 4."""
        if record.arguments[0] != Name("numpy.ndarray"):
            raise ValueError("an array of a foreign class")
        _, shape, dtype, fortran, data = record.state
        return self.laid_out(shape, self.of(dtype, depth), data, "F" if fortran else "C", depth)

    def array_of_buffer(self, record: Made, depth: int) -> Any:
        """numpy's arrays in protocol 5; order K is C with the axes exchanged."""
        data, dtype, shape, order, *axes = record.arguments
        array = self.laid_out(shape, self.of(dtype, depth), data, "C" if order == "K" else order, depth)
        return array.transpose(*axes) if order == "K" else array

    def scalar(self, record: Made, depth: int) -> Any:
        """A number of numpy's own types."""
        dtype, data = record.arguments
        return self.laid_out((), self.of(dtype, depth), data, "C", depth).item()

    def sparse(self, record: Made, depth: int) -> np.ndarray:
        """A compressed sparse matrix, made dense; its indices are checked, as scipy's C code would not."""
        state = {name: self.of(record.state[name], depth) for name in ("_shape", "indptr", "indices", "data")}
        by_column = record.name.endswith("csc_matrix")
        ends, inner, data = (_vector(state[name]) for name in ("indptr", "indices", "data"))
        if not _is_shape(state["_shape"]) or len(state["_shape"]) != 2:
            raise ValueError("a sparse matrix without a proper shape")
        major, minor = state["_shape"][::-1] if by_column else state["_shape"]
        whole = ends.dtype.kind in "iu" and inner.dtype.kind in "iu"
        if not whole or len(ends) != major + 1 or len(inner) != len(data) or ends[0] != 0 or ends[-1] != len(data):
            raise ValueError("a sparse matrix whose parts differ in length")
        if (ends[1:] < ends[:-1]).any() or (len(inner) and not 0 <= inner.min() <= inner.max() < minor):
            raise ValueError("a sparse matrix with indices outside its shape")
        self.spend(8 * (major * minor + 2 * len(data)))
        dense, counts = np.zeros((major, minor)), (ends[1:] - ends[:-1]).astype(np.int64)
        np.add.at(dense, (np.repeat(np.arange(major), counts), inner), data)
        return dense.T if by_column else dense

    def chumpy(self, record: Made, depth: int) -> np.ndarray:
        """What a chumpy expression computed: its array `x`, or those of the entries of `a` that `idxs` selects."""
        state = record.state
        if not isinstance(state, dict) or not ("x" in state or {"a", "idxs"} <= state.keys()):
            raise ValueError(f"{ascii(record.name[:80])[1:-1]} holds no array")
        if "x" in state:
            return np.asarray(_array(self.of(state["x"], depth)))
        source, places = _array(self.of(state["a"], depth)), _vector(self.of(state["idxs"], depth))
        if places.dtype.kind not in "iu" or (len(places) and not 0 <= places.min() <= places.max() < source.size):
            raise ValueError("a selection outside its array")
        shape = self.of(state["preferred_shape"], depth) if "preferred_shape" in state else places.shape
        if not _is_shape(shape) or math.prod(shape) != len(places):
            raise ValueError("a selection that does not fill its shape")
        self.spend(source.nbytes + len(places) * source.itemsize)
        return source.ravel()[places].reshape(shape)

    def tensor(self, record: Made, depth: int) -> np.ndarray:
        """A torch tensor: a view of a storage, which numpy checks against its bounds."""
        storage, offset, size, stride = record.arguments[:4]
        flat = _vector(self.of(storage, depth))
        if not _is_shape(size) or not _is_shape(stride) or not _is_shape((offset,)):
            raise ValueError("a tensor without a proper shape")
        self.spend(math.prod(size) * flat.itemsize)
        steps = [step * flat.itemsize for step in stride]
        return np.ndarray(size, flat.dtype, flat, offset * flat.itemsize, steps).copy()

    def storage(self, record: Made, depth: int) -> np.ndarray:
        """The numbers of a tensor: a file of torch's within the pickle, of the old or of the zip format."""
        (data,) = record.arguments
        raw = self.raw(data, depth)
        self.spend(len(raw))
        file = io.BytesIO(raw)
        if raw.startswith(b"PK"):
            return self.zipped_storage(file, depth)
        magic, _, _, stored, _ = (load(file, self.source) for _ in range(5))
        if magic != TORCH_MAGIC:
            raise ValueError("a tensor of an unknown format")
        _, dtype, count = _stored(stored)
        if struct.unpack("<q", file.read(8)) != (count,):
            raise ValueError("a tensor whose lengths differ")
        return np.asarray(self.laid_out((count,), dtype, file.read(), "C", depth))

    def zipped_storage(self, file: io.BytesIO, depth: int) -> np.ndarray:
        """The storage in a zip file: data.pkl says what it is, data/KEY holds the numbers."""
        with ZipFile(file) as archive:
            check_packing(archive)
            root = archive.namelist()[0].partition("/")[0]
            key, dtype, count = _stored(load(io.BytesIO(self.member(archive, f"{root}/data.pkl")), self.source))
            return np.asarray(self.laid_out((count,), dtype, self.member(archive, f"{root}/data/{key}"), "C", depth))

    def member(self, archive: ZipFile, name: str) -> bytes:
        """A file in a zip file, of the size that its directory claims; ZipFile.read unpacks whatever there is first."""
        size = archive.getinfo(name).file_size
        self.spend(size)
        with archive.open(name) as member:
            return member.read(size)


def _stored(record: Any) -> tuple[str, np.dtype, int]:
    """Key, type and length of a storage that torch keeps beside its pickle."""
    if not isinstance(record, Made) or record.name != PERSISTENT:
        raise ValueError("a tensor without its numbers")
    ((word, kind, key, _, count, *_),) = record.arguments
    if word != "storage" or not isinstance(kind, Name) or not isinstance(key, str) or not _is_shape((count,)):
        raise ValueError("a tensor without its numbers")
    return key, np.dtype(TORCH_STORAGES[kind.full]), count


def _is_shape(shape: Any) -> bool:
    """Lengths, offsets or strides: few, and small enough to be multiplied at no cost."""
    return (isinstance(shape, tuple) and len(shape) <= MAX_DEPTH
            and all(type(length) is int and 0 <= length < 1 << 62 for length in shape))


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"a {type(value).__name__} in place of an array")
    return value


def _vector(value: Any) -> np.ndarray:
    if _array(value).ndim != 1:
        raise ValueError(f"an array of shape {value.shape} in place of a vector")
    return value
