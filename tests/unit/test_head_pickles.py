"""What a pickle may describe becomes arrays; whatever else it asks for is refused and does not happen."""
import builtins
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import scipy.sparse
import torch

from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.head import pickle_machine, pickles
from caphuman_edge.runtime.head.pickles import read_pickle

PROTOCOLS = range(6)
GRID = np.arange(24, dtype=np.float64).reshape(2, 3, 4)


@pytest.fixture
def read(tmp_path):
    """`read(content, protocol)`: what comes back of an object that was pickled, or of the bytes of a pickle."""

    def from_file(content, protocol=2):
        data = content if isinstance(content, bytes) else pickle.dumps({"it": content}, protocol)
        (tmp_path / "model.pkl").write_bytes(data)
        return read_pickle(tmp_path / "model.pkl", ["it"])["it"]

    return from_file


@pytest.fixture
def refused(read):
    """The one line that refuses a pickle."""

    def why(content, protocol=2):
        with pytest.raises(CheckpointError, match=r"model\.pkl") as caught:
            read(content, protocol)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        return str(caught.value)

    return why


class Calls:
    """A pickle of this calls something."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


# What is read.


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", [
    GRID, GRID.astype(">f4"), np.asfortranarray(GRID), GRID[::2, 1], GRID.transpose(2, 0, 1), np.zeros((0, 3)),
    np.array(7, np.uint32), np.array([2**32 - 1], np.uint32), np.array([True, False]), GRID.astype(np.float16),
], ids=str)
def test_arrays_of_numbers_are_read_in_every_protocol(read, array, protocol):
    found = read(array, protocol)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read_in_every_protocol(read, protocol):
    value = {"a": [1, -2, 2**70, 0.5, None, True], "b": ("é\n", b"\xff\x00", b""), "c": {"d": []}, "e": "", "f": ()}
    assert read(value, protocol) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_of_numpys_types_are_read(read, protocol):
    assert read([np.float64(0.25), np.int32(-3), np.bool_(True)], protocol) == [0.25, -3, True]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [scipy.sparse.csc_matrix, scipy.sparse.csr_matrix])
def test_sparse_matrices_become_dense(read, kind, protocol):
    dense = np.zeros((3, 5))
    dense[[0, 2, 2], [4, 0, 3]] = 1.5, -2, 3
    np.testing.assert_array_equal(read(kind(dense), protocol), dense)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_chumpys_arrays_and_selections_are_computed(read, chumpy, protocol):
    whole = chumpy.ch.Ch(GRID)
    some = chumpy.reordering.Select(a=whole, idxs=np.array([0, 5, 23, 1]), preferred_shape=(2, 2))
    np.testing.assert_array_equal(read(whole, protocol), GRID)
    np.testing.assert_array_equal(read(some, protocol), [[0, 5], [23, 1]])


def test_a_chumpy_expression_that_nobody_asks_for_does_no_harm(tmp_path, chumpy):
    content = {"J": chumpy.reordering.transpose(a=chumpy.ch.Ch(GRID), axes=None), "it": GRID}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    np.testing.assert_array_equal(read_pickle(tmp_path / "model.pkl", ["it"])["it"], GRID)
    with pytest.raises(CheckpointError, match=r"chumpy\.reordering\.transpose holds no array"):
        read_pickle(tmp_path / "model.pkl", ["J"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("tensor", [
    torch.arange(24.0).reshape(2, 3, 4), torch.arange(12).reshape(3, 4).t()[1:], torch.tensor(3, dtype=torch.int32),
    torch.tensor([True, False]), torch.zeros(0, 3, dtype=torch.float64), torch.ones(1).expand(4),
], ids=["floats", "view", "number", "booleans", "empty", "expanded"])
def test_tensors_are_read_in_every_protocol(read, tensor, protocol):
    np.testing.assert_array_equal(read(tensor, protocol), tensor.numpy())


def test_a_tensor_whose_storage_is_a_zip_file_is_read(read):
    storage = io.BytesIO()
    torch.save(torch.arange(6.0)._typed_storage(), storage)
    made = Calls(torch._utils._rebuild_tensor_v2, Calls(torch.storage._load_from_bytes, storage.getvalue()), 1, (2, 2),
                 (2, 1), False, OrderedDict())
    np.testing.assert_array_equal(read(made), [[1, 2], [3, 4]])


def test_a_dictionary_that_numpy_saved_is_read(tmp_path):
    path = tmp_path / "landmark_embedding.npy"
    np.save(path, {"static": GRID, "dynamic": torch.arange(4)}, allow_pickle=True)
    found = read_pickle(path, ["static", "dynamic", "not there"])
    assert found.keys() == {"static", "dynamic"}
    np.testing.assert_array_equal(found["dynamic"], [0, 1, 2, 3])


def test_strings_of_python_2_hold_arrays(read):
    """Protocols 0 and 2, as cPickle wrote them: the numbers lie in a byte string, escaped in the former."""
    numbers = np.array([1.5, -2.25]).tobytes()
    start = b"}S'it'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    escaped = "".join(f"\\x{byte:02x}" for byte in numbers).encode()
    for data in (b"S'" + escaped + b"'\n", b"T" + struct.pack("<i", len(numbers)) + numbers):
        found = read(start + b"(I1\n(I2\nt" + dtype + b"I00\n" + data + b"tbs.")
        np.testing.assert_array_equal(found, [1.5, -2.25])


# What is refused.


@pytest.mark.parametrize(("function", "arguments", "name"), [
    (os.system, ("touch ran",), "system"), (builtins.eval, ("open('ran', 'w')",), "eval"),
    (builtins.exec, ("open('ran', 'w')",), "exec"), (builtins.getattr, ("", "upper"), "getattr"),
    (np.fromfile, ("/etc/passwd",), "fromfile"), (np.load, ("x.npy",), "load"), (np.zeros, (2**40,), "zeros"),
    (pickle.loads, (b"N.",), "loads"), (torch.load, ("x.pt",), "load"), (bytearray, (2**40,), "bytearray"),
], ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_function_that_is_no_arrays_is_neither_imported_nor_called(refused, tmp_path, monkeypatch, function,
                                                                     arguments, name, protocol):
    monkeypatch.chdir(tmp_path)
    message = refused(Calls(function, *arguments), protocol)
    assert name in message and "no head file needs" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [
    b"os\nsystem", b"posix\nsystem", b"numpy\nload", b"numpy.core.multiarray\nfromfile", b"builtins\n__import__",
    b"numpy\nmemmap", b"numpy.core.records\nrecarray", b"scipy.sparse.csc\n__builtins__", b"chumpyx.ch\nCh",
    b"chumpy.ch\n" + b"C" * 90,
    b"torch\nload", b"collections\nOrderedDict.__reduce__",
])
def test_a_name_outside_the_list_is_told(refused, name):
    assert name.replace(b"\n", b".").decode()[:80] in refused(b"\x80\x02}X\x02\x00\x00\x00itc" + name + b"\ns.")


def test_a_name_with_a_known_one_in_its_module_is_told(refused):
    assert "numpy.os" in refused(b"\x80\x04}\x8c\x02it\x8c\x08numpy.os\x8c\x06system\x93s.")


@pytest.mark.parametrize("instruction", ["INST", "OBJ", "EXT1", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER"])
def test_instructions_that_arrays_do_not_need_are_refused(refused, instruction):
    code = {"INST": b"(ios\nsystem\n", "OBJ": b"(cnumpy\nndarray\no", "EXT1": b"\x82\x01", "PERSID": b"P1\n",
            "NEWOBJ_EX": b"cnumpy\nndarray\n)}\x92", "NEXT_BUFFER": b"\x97"}[instruction]
    assert instruction in refused(b"\x80\x02}X\x02\x00\x00\x00it" + code + b"s.")


class Sub(np.ndarray):
    """A foreign class of arrays, which numpy would let run its own __setstate__."""


F8 = np.dtype("f8")


def array_state(shape=(2,), dtype=F8, data=bytes(16), fortran=False):
    return Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, fortran, data))


def sparse_of(**changes):
    matrix = scipy.sparse.csc_matrix(np.eye(3))
    vars(matrix).update(changes)
    return matrix


def tensor_of(size, stride, offset=0, storage=None):
    storage = torch.zeros(4)._typed_storage() if storage is None else storage
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def storage_of(content, count):
    """A torch file of the old format whose parts are these."""
    parts = [pickles.TORCH_MAGIC, 1001, {}]
    return Calls(torch.storage._load_from_bytes, b"".join(pickle.dumps(part, 2) for part in parts) + content + count)


def persistent(*identity):
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 2)
    pickler.persistent_id = lambda value: identity if value == "it" else None
    pickler.dump("it")
    return file.getvalue() + pickle.dumps(["0"], 2)


HUGE = 2**40  # numbers: terabytes
REFUSED = {
    "a shape that takes hours to multiply": array_state(shape=(7**50_000,) * 9),
    "a shape of a thousand lengths": array_state(shape=(1,) * 1000),
    "fewer numbers than the shape says": array_state(shape=(HUGE,)),
    "more numbers than the shape says": array_state(shape=(1,)),
    "a shape below nothing": array_state(shape=(-2,)),
    "a shape of fractions": array_state(shape=(2.0,)),
    "a shape that is no tuple": array_state(shape=2),
    "objects for numbers": array_state(dtype=np.dtype("O")),
    "more objects than the shape says": array_state(dtype=np.dtype("O"), data=[1, 2, 3]),
    "numbers of several parts": array_state(shape=(1,), dtype=np.dtype([("a", "f8"), ("b", "f8")])),
    "numbers that are arrays": array_state(shape=(1,), dtype=np.dtype(("f8", 2))),
    "strings": array_state(shape=(1,), dtype=np.dtype("S16")),
    "dates": array_state(dtype=np.dtype("M8[s]")),
    "no type": array_state(dtype="f8"),
    "a type of unknown name": array_state(dtype=Calls(np.dtype, "os.system", False, True)),
    "a type with fields in its state": array_state(dtype=Calls(
        np.dtype, "f8", False, True, state=(3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 0))),
    "an array of a foreign class": Calls(np._core.multiarray._reconstruct, np.dtype, (0,), b"b",
                                         state=(1, (2,), np.dtype("f8"), False, bytes(16))),
    "an array without a state": Calls(np._core.multiarray._reconstruct, np.ndarray, (HUGE,), b"b"),
    "the class of arrays called": Calls(np.ndarray, (HUGE,)),
    "sparse: an index beyond the last row": sparse_of(indices=np.array([0, 1, 3], np.int32)),
    "sparse: an index below the first": sparse_of(indices=np.array([0, -1, 2], np.int32)),
    "sparse: columns that end before they start": sparse_of(indptr=np.array([0, 3, 1, 3], np.int32)),
    "sparse: columns that end beyond the data": sparse_of(indptr=np.array([0, 1, 2, 9], np.int32)),
    "sparse: an index too few": sparse_of(indices=np.array([0, 1], np.int32)),
    "sparse: indices of fractions": sparse_of(indices=np.array([0.0, 1.0, 2.0])),
    "sparse: a shape that needs terabytes": sparse_of(_shape=(HUGE, 3)),
    "sparse: no shape": sparse_of(_shape=None),
    "tensor: beyond its storage": tensor_of((5,), (1,)),
    "tensor: before its storage": tensor_of((4,), (1,), -1),
    "tensor: backwards out of its storage": tensor_of((3,), (-1,)),
    "tensor: strides that wrap around": tensor_of((2,), (2**62,)),
    "tensor: one number repeated for terabytes": tensor_of((HUGE,), (0,)),
    "tensor: sizes of fractions": tensor_of((2.0,), (1,)),
    "tensor: no storage": tensor_of((2,), (1,), storage=[1, 2]),
    "tensor: a storage of no format": tensor_of((2,), (1,), storage=storage_of(b"", b"")),
    "tensor: a storage of terabytes": tensor_of((2,), (1,), storage=storage_of(
        persistent("storage", torch.FloatStorage, "0", "cpu", HUGE, None), struct.pack("<q", HUGE))),
    "tensor: a storage of a foreign class": tensor_of((2,), (1,), storage=storage_of(
        persistent("storage", np.ndarray, "0", "cpu", 2, None), struct.pack("<q", 2) + bytes(16))),
    "tensor: a storage that is a module": tensor_of((2,), (1,), storage=storage_of(
        persistent("module", torch.FloatStorage, "0", "cpu", 2, None), struct.pack("<q", 2) + bytes(8))),
    "a persistent id outside tensors": storage_of(b"", b""),
    "a buffer of another length": Calls(np._core.numeric._frombuffer, b"abc", np.dtype("f8"), (1,), "C"),
    "a buffer in an unknown order": Calls(np._core.numeric._frombuffer, bytes(8), np.dtype("f8"), (1,), "X"),
    "a scalar of another length": Calls(np._core.multiarray.scalar, np.dtype("f8"), b"abc"),
    "a name in place of a value": np.ndarray,
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_array_that_is_not_what_it_says_is_refused(refused, case):
    assert "is no pickled dictionary of arrays, or is damaged" in refused(REFUSED[case])


def test_a_subclass_of_arrays_is_refused(refused):
    assert "Sub" in refused(GRID.view(Sub))


def test_a_name_that_is_no_string_is_refused(refused):
    assert "no string" in refused(b"\x80\x04}\x8c\x02it](K\x01e\x8c\x06system\x93s.")


def test_a_state_reaches_no_function_and_no_list(refused):
    """Python's own unpickler would write it into the attributes of whatever lies there."""
    start = b"\x80\x02}X\x02\x00\x00\x00it"
    assert "a state for something" in refused(start + b"cnumpy.core.multiarray\n_reconstruct\n}bs.")
    assert "a state for something" in refused(start + b"]}bs.")
    assert not hasattr(pickle_machine.Name, "x")


def test_a_thing_that_holds_itself_is_refused(refused, chumpy):
    loop: list[object] = []
    loop.append(loop)
    assert "nested too deeply" in refused(loop)
    snake = chumpy.ch.Ch()
    snake.x = snake
    assert "nested too deeply" in refused(snake)


def test_lists_within_lists_without_end_are_refused(refused):
    deep = b"(" * 20_000 + b"t" * 20_000
    assert "nested too deeply" in refused(b"\x80\x02}X\x02\x00\x00\x00it" + deep + b"s.")


def test_laughter_a_billion_times_is_read_once(read):
    laugh: list[object] = ["ha"]
    for _ in range(12):
        laugh = [laugh] * 10  # a million million strings, were each written out
    assert read(laugh)[0][9][0][9][0][9][0][9][0][9][0][9] == ["ha"]


def test_a_laughing_name_of_a_storage_is_not_written_out(refused):
    laugh: list[object] = ["ha"]
    for _ in range(12):
        laugh = [laugh] * 10
    named = persistent("storage", torch.FloatStorage, laugh, "cpu", 2, None)
    assert "without its numbers" in refused(tensor_of((2,), (1,), storage=storage_of(named, bytes(16))))


def test_a_packed_storage_unpacks_to_no_more_than_it_claims(refused):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    data = bytearray(packed.getvalue())
    directory = data.rindex(b"PK\x01\x02")
    for place in (22, directory + 24):  # the unpacked size, in the member's own header and in the directory
        data[place:place + 4] = struct.pack("<I", 100)
    storage = Calls(torch.storage._load_from_bytes, bytes(data))
    tracemalloc.start()
    refused(tensor_of((2,), (1,), storage=storage))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_one_string_made_into_many_arrays_may_not_outgrow_the_file(refused, monkeypatch):
    monkeypatch.setattr(pickles, "SPARE", 1 << 20)
    text = "x" * 2_000_000
    bomb = [Calls(__import__("_codecs").encode, text, "latin1") for _ in range(9)]
    assert "larger than the file" in refused(bomb)


def test_a_length_beyond_the_file_reserves_nothing(refused):
    assert "remain" in refused(b"\x80\x04}\x8c\x02it\x8e" + struct.pack("<Q", 2**62) + b"abcs.")


def test_a_memo_entry_far_away_reserves_nothing(refused):
    assert "memo" in refused(b"\x80\x02}X\x02\x00\x00\x00itNr\xff\xff\xff\xffs.")


def test_more_steps_than_any_head_takes_are_refused(refused, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    assert "more than 1000 steps" in refused(list(range(2000)))


def test_keys_that_are_no_strings_are_refused(refused):
    assert "a key of type int" in refused({2**61 - 1: 1})


def test_a_file_larger_than_any_head_is_not_read(refused, monkeypatch):
    monkeypatch.setattr(pickles, "MAX_FILE", 10)
    assert "more than any head" in refused(GRID)


@pytest.mark.parametrize("content", [b"", b".", b"<html>Not found</html>", b"\x80\x02N.", b"\x80\x02]q\x00.", b"0.",
                                     b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"S'half\n", b"\x80\x04}\x8c", b"a."])
def test_a_file_that_is_no_pickled_dictionary_is_refused(refused, content):
    assert "is no pickled dictionary of arrays" in refused(content)


def test_an_array_saved_without_pickle_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", GRID)
    with pytest.raises(CheckpointError, match="plain numbers"):
        read_pickle(tmp_path / "a.npy", ["it"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pkl cannot be read"):
        read_pickle(tmp_path / "gone.pkl", [])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_however_a_pickle_is_cut_or_altered_the_error_is_one_of_ours(tmp_path, chumpy, protocol):
    content = {"it": [chumpy.ch.Ch(GRID), scipy.sparse.csc_matrix(np.eye(3)), torch.arange(4.0), np.float32(2)]}
    whole = pickle.dumps(content, protocol)
    rng = np.random.default_rng(protocol)
    path = tmp_path / "model.pkl"
    refusals = 0
    for _ in range(60):
        data = bytearray(whole[:rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, len(data), rng.integers(0, 5)):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_pickle(path, ["it"])
        except CheckpointError:
            refusals += 1
    assert refusals > 20
