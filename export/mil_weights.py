"""Constants of a MIL program: values inside the program, and blobs of its memory-mapped weight files.

The blob file is coremltools' "blob storage, version 2" (MILBlob/Blob/StorageFormat.hpp), little-endian:
a header of 64 bytes (uint32 count, uint32 version 2), then for each blob, aligned to 64 bytes, a record of 64 bytes
(uint32 sentinel 0xDEADBEEF, uint32 data type, uint64 size in bytes, uint64 offset of the data, uint64 unused bits at
the end of data narrower than a byte) and its data. A program refers to the record. Elements narrower than a byte are
packed from the least significant bit up.
"""
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caphuman_edge.runtime.errors import BundleError

SENTINEL = 0xDEADBEEF
ALIGNMENT = 64  # bytes
VERSION = 2


@dataclass(frozen=True)
class ElementType:
    """An element type: its name, its width, its code in blob files, and how it is stored and held in memory."""

    name: str
    bits: int
    code: int  # 0: never in a blob file
    stored: str  # numpy dtype of whole elements; of narrow ones, which are unpacked, the dtype they get
    held: torch.dtype  # what values are computed and kept in; torch has no full uint16 and uint32

    @property
    def narrow(self) -> bool:
        """Whether several elements share a byte."""
        return self.bits < 8


TYPES: dict[int, ElementType] = {  # by number in MIL.proto's DataType
    1: ElementType("bool", 8, 0, "?", torch.bool),
    10: ElementType("float16", 16, 1, "<f2", torch.float16),
    11: ElementType("float32", 32, 2, "<f4", torch.float32),
    12: ElementType("float64", 64, 0, "<f8", torch.float64),
    25: ElementType("int4", 4, 8, "i1", torch.int8),
    21: ElementType("int8", 8, 4, "i1", torch.int8),
    22: ElementType("int16", 16, 6, "<i2", torch.int16),
    23: ElementType("int32", 32, 14, "<i4", torch.int32),
    24: ElementType("int64", 64, 0, "<i8", torch.int64),
    37: ElementType("uint1", 1, 9, "u1", torch.uint8),
    36: ElementType("uint2", 2, 10, "u1", torch.uint8),
    39: ElementType("uint3", 3, 12, "u1", torch.uint8),
    35: ElementType("uint4", 4, 11, "u1", torch.uint8),
    38: ElementType("uint6", 6, 13, "u1", torch.uint8),
    31: ElementType("uint8", 8, 3, "u1", torch.uint8),
    32: ElementType("uint16", 16, 7, "<u2", torch.int32),
    33: ElementType("uint32", 32, 15, "<u4", torch.int64),
}
FIELDS = {"floats": "f", "doubles": "f", "ints": "iu", "longInts": "iu", "bools": "b"}  # numpy's kinds
STRING_NUMBER = 2
STRING = ElementType("string", 8, 0, "S1", torch.uint8)  # parameters such as modes


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; None stands for a length that only a run knows."""

    element: ElementType
    shape: tuple[int | None, ...]

    @property
    def count(self) -> int:
        """Elements of a tensor of this type; its lengths must be known."""
        return math.prod(n for n in self.shape if n is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that a constant of this type occupies."""
        return -(-self.count * self.element.bits // 8)


def tensor_type(value_type: Any, where: str) -> TensorType:
    """A tensor type from its protobuf record; lists, dictionaries and states raise BundleError."""
    kind = value_type.WhichOneof("type")
    if kind != "tensorType":
        raise BundleError(f"{where} is a {kind or 'value without type'}, expected a tensor; convert to tensors only")
    record = value_type.tensorType
    element = STRING if record.dataType == STRING_NUMBER else TYPES.get(record.dataType)
    if element is None:
        raise BundleError(f"{where} has element type {record.dataType}, which is none of MIL's known ones; export it "
                          f"with a coremltools of the pinned version")
    if record.rank != len(record.dimensions):
        raise BundleError(f"{where} has rank {record.rank} but {len(record.dimensions)} lengths; export it again")
    return TensorType(element, tuple(n.constant.size if n.WhichOneof("dimension") == "constant" else None
                                     for n in record.dimensions))


class BlobFile:
    """One weight file, mapped into memory. Nothing is read before it is used, nothing is copied."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file() or path.stat().st_size < ALIGNMENT:
            raise BundleError(f"{path} is no blob file: expected a header of {ALIGNMENT} bytes; export the model again")
        with open(path, "rb") as file:  # a private copy-on-write map, because torch takes no read-only memory
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _, version = struct.unpack_from("<II", self.memory)
        if version != VERSION:
            raise BundleError(f"{path} has blob format {version}, expected {VERSION}; export the model again")

    def locate(self, record: int, tensor: TensorType, where: str) -> int:
        """Offset of the data that the blob record at `record` describes, checked against the tensor's type."""
        if record % ALIGNMENT or record + ALIGNMENT > len(self.memory):
            raise BundleError(f"{self.path}: {where} points at byte {record} of {len(self.memory)}; the file is "
                              f"truncated or another model's: export it again")
        sentinel, code, size, offset = struct.unpack_from("<IIQQ", self.memory, record)
        if sentinel != SENTINEL or code != tensor.element.code or size != tensor.nbytes:
            raise BundleError(f"{self.path}: the blob of {where} has type {code} and {size} bytes, expected type "
                              f"{tensor.element.code} ({tensor.element.name}) and {tensor.nbytes}; export it again")
        if offset + size > len(self.memory):
            raise BundleError(f"{self.path}: {where} ends at byte {offset + size} of {len(self.memory)}; the file is "
                              f"truncated: export the model again")
        return int(offset)


@dataclass(frozen=True)
class Constant:
    """A constant: a string, a tensor from inside the program, or the place of one in a blob file."""

    type: TensorType
    value: Tensor | str | None = None
    file: BlobFile | None = None
    offset: int = 0  # bytes

    def read(self) -> Tensor | str:
        """The value. A blob's tensor lies in the mapped file, unless its elements have to be unpacked."""
        if self.file is None:
            assert self.value is not None
            return self.value
        return _tensor(self.file.memory, self.offset, self.type)


def constant(record: Any, files: "WeightFiles", where: str) -> Constant:
    """A constant from its protobuf value, its size checked. Raises BundleError."""
    tensor = tensor_type(record.type, where)
    if None in tensor.shape:
        raise BundleError(f"{where} is a constant of unknown length; export the model again")
    if record.WhichOneof("value") == "blobFileValue":
        file = files.open(record.blobFileValue.fileName, where)
        return Constant(tensor, file=file, offset=file.locate(record.blobFileValue.offset, tensor, where))
    stored = record.immediateValue.tensor
    field = stored.WhichOneof("value")
    if field is None:
        raise BundleError(f"{where} is a constant without a value; export the model again")
    values = getattr(stored, field).values
    if tensor.element is STRING:
        if field != "strings" or len(values) != 1:
            raise BundleError(f"{where} is {len(values)} {field}, expected one string; export the model again")
        return Constant(tensor, values[0])
    return Constant(tensor, _immediate(values, field, tensor, where))


def _immediate(values: Any, field: str, tensor: TensorType, where: str) -> Tensor:
    """A tensor from the numbers or the bytes that the program itself holds."""
    expected = tensor.nbytes if field == "bytes" else tensor.count
    fits = field == "bytes" or np.dtype(tensor.element.stored).kind in FIELDS.get(field, "")
    if len(values) != expected or not fits:
        raise BundleError(f"{where} has {len(values)} {field}, expected {expected} for {tensor.element.name} of shape "
                          f"{list(tensor.shape)}; export the model again")
    if field == "bytes":
        return _tensor(bytearray(values), 0, tensor)
    numbers = np.array(values, np.float64 if FIELDS[field] == "f" else np.int64)
    if FIELDS[field] == "iu" and not np.array_equal(numbers, numbers.astype(tensor.element.stored)):
        raise BundleError(f"{where} has numbers that {tensor.element.name} does not hold; export the model again")
    return torch.from_numpy(numbers).to(tensor.element.held).reshape([n or 0 for n in tensor.shape])


class WeightFiles:
    """The blob files beside a program, each mapped once."""

    def __init__(self, folder: Path):
        self.folder = folder  # where the model's specification lies
        self.opened: dict[str, BlobFile] = {}

    def open(self, name: str, where: str) -> BlobFile:
        """The blob file that a program calls "@model_path/..."; paths out of the package raise BundleError."""
        if name not in self.opened:
            inside = name.removeprefix("@model_path/")
            path = (self.folder / inside).resolve()
            if inside == name or not path.is_relative_to(self.folder.resolve()):
                raise BundleError(f"{where} lies in {name!r}, expected a file below @model_path; the package is not "
                                  f"to be trusted")
            self.opened[name] = BlobFile(path)
        return self.opened[name]


def _tensor(memory: "mmap.mmap | bytearray", offset: int, tensor: TensorType) -> Tensor:
    shape = [n or 0 for n in tensor.shape]
    if not tensor.count:
        return torch.empty(shape, dtype=tensor.element.held)
    if tensor.element.narrow:
        packed = np.frombuffer(memory, np.uint8, tensor.nbytes, offset)
        return unpack(torch.from_numpy(packed), tensor.element.bits, tensor.count,
                      tensor.element.held is torch.int8).reshape(shape)
    whole = np.frombuffer(memory, tensor.element.stored, tensor.count, offset)
    if tensor.element.name in ("uint16", "uint32"):
        whole = whole.astype(np.int32 if tensor.element.bits == 16 else np.int64)
    return torch.from_numpy(whole).reshape(shape)


def unpack(packed: Tensor, bits: int, count: int, signed: bool = False) -> Tensor:
    """(count,) elements of `bits` bits from bytes; the first element is in the lowest bits of the first byte."""
    flags = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(flags, axis=1, bitorder="little")[:, 0]
    if signed:  # shift the sign bit to the top, and back with its copies
        return torch.from_numpy((values << (8 - bits)).view(np.int8) >> (8 - bits))
    return torch.from_numpy(values)
