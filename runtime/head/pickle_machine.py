"""A machine for pickles that runs nothing: what a pickle would import stays a name, what it would call stays a record.

Python's own unpickler imports and calls what a file tells it to, and writes into the results. Here the stack holds
plain values, `Name`s of a fixed list, and `Made` records that `pickles` turns into arrays.
"""
import codecs
import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from caphuman_edge.runtime.errors import CheckpointError

MAX_STEPS = 100_000  # FLAME takes some hundreds; also bounds the memory for small objects
MODULES = {  # where the same thing has lain: Python 2, older scipy, numpy before 2
    "copy_reg": "copyreg", "__builtin__": "builtins", "scipy.sparse._csc": "scipy.sparse.csc",
    "scipy.sparse._csr": "scipy.sparse.csr", "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
}
TORCH_STORAGES = {"torch.DoubleStorage": "f8", "torch.FloatStorage": "f4", "torch.HalfStorage": "f2",
                  "torch.LongStorage": "i8", "torch.IntStorage": "i4", "torch.ShortStorage": "i2",
                  "torch.CharStorage": "i1", "torch.ByteStorage": "u1", "torch.BoolStorage": "?"}
NAMES = {
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy.ndarray", "numpy.dtype", "scipy.sparse.csc.csc_matrix", "scipy.sparse.csr.csr_matrix",
    "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes", *TORCH_STORAGES,
    "collections.OrderedDict", "builtins.set", "builtins.bytes", "builtins.object", "copyreg._reconstructor",
    "_codecs.encode",
}
LONGEST_NAME = 100  # or one long string could be repeated in many names
CHUMPY = "chumpy."  # its classes are records of how an array was computed
PERSISTENT = "persistent id"  # of a record: data that torch keeps beside the pickle

OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
            "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
            "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_DICT": dict,
}


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    full: str


@dataclass(eq=False)
class Made:
    """An object that a pickle describes: its class or maker, what that is given, and the state set afterwards."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


def load(file: io.BytesIO, source: str) -> Any:
    """The value of the pickle that starts here: plain values, `Name` and `Made`.

    `file` lies in memory, so that a length it claims cannot reserve more than it holds. Raises CheckpointError for a
    name outside NAMES or an instruction that heads do not need; a damaged pickle raises ValueError or LookupError.
    """
    machine = _Machine(source)
    for _ in range(MAX_STEPS):
        opcode = OPCODES.get(code := file.read(1).decode("latin-1"))
        if opcode is None:
            raise ValueError(f"{code!a} where an instruction belongs" if code else "it ends early")
        if opcode.name == "STOP":
            return machine.stack.pop()
        if opcode.name == "STRING":
            argument: Any = _escaped_string(file)
        else:
            argument = opcode.arg.reader(file) if opcode.arg else None
        machine.step(opcode.name, argument)
    raise CheckpointError(f"{source} takes more than {MAX_STEPS} steps to unpickle, so it is no head; fetch it again")


def _escaped_string(file: io.BytesIO) -> str:
    """A quoted line of protocol 0; pickletools refuses the bytes above 127 that Python 2's arrays hold."""
    line = file.readline()
    if len(line) < 3 or line[-1:] != b"\n" or line[:1] not in (b"'", b'"') or line[-2:-1] != line[:1]:
        raise ValueError("a string without its quotes")
    return codecs.escape_decode(line[1:-2])[0].decode("latin-1")


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, source: str):
        self.source = source
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name]())
        elif name in ACTIONS:
            ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise self.refused(f"the pickle instruction {name}")

    def refused(self, what: str) -> CheckpointError:
        """The error for what could do more than describe arrays."""
        return CheckpointError(f"{self.source} asks for {what}, which no head file needs, so it is not read; "
                               "fetch the file again from its official place")

    def name(self, _: Any = None, full: str = "") -> None:
        """STACK_GLOBAL, and the end of GLOBAL."""
        if not full:
            function, module = self.stack.pop(), self.stack.pop()
            if not isinstance(function, str) or not isinstance(module, str):
                raise ValueError("a name that is no string")
            full = f"{module} {function}"
        module, _, function = full.partition(" ")
        known = f"{MODULES.get(module, module)}.{function}"
        if known not in NAMES and not (known.startswith(CHUMPY) and len(known) < LONGEST_NAME):
            raise self.refused(ascii(known[:80]).strip("'"))
        self.stack.append(Name(known))

    def call(self, _: Any) -> None:
        """REDUCE and NEWOBJ: what would be a call becomes a record."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no name")
        if called.full == "copyreg._reconstructor":  # (class, base, its state), in protocols 0 and 1
            called, arguments = arguments[0], ()
        empty = (called.full, arguments) == ("collections.OrderedDict", ())
        self.stack.append({} if empty else Made(called.full, arguments))

    def build(self, _: Any) -> None:
        """BUILD: the state of a record, and of nothing else."""
        state, made = self.stack.pop(), self.stack[-1]
        if not isinstance(made, Made):
            raise ValueError("a state for something that has none")
        made.state = state

    def remember(self, place: int) -> None:
        """PUT and MEMOIZE."""
        if place > MAX_STEPS:
            raise ValueError(f"a memo of {place} entries")
        self.memo[place] = self.stack[-1]

    def extend(self, _: Any) -> None:
        """APPENDS and ADDITEMS."""
        items = self.since_mark()
        self.last(list).extend(items)

    def append(self, _: Any) -> None:
        """APPEND."""
        item = self.stack.pop()
        self.last(list).append(item)

    def put_items(self, _: Any) -> None:
        """SETITEMS."""
        items = self.since_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.last(dict), key, value)

    def put_item(self, _: Any) -> None:
        """SETITEM."""
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.last(dict), key, value)

    def dictionary(self, _: Any) -> None:
        """DICT."""
        items = self.since_mark()
        self.stack.append({})
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def short_tuple(self, length: int) -> None:
        """TUPLE1 to TUPLE3."""
        if len(self.stack) < length:
            raise IndexError("a tuple of more than there is")
        items = tuple(self.stack[-length:])
        self.stack[-length:] = [items]

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, kind: type) -> Any:
        """The top of the stack, of this type."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"items for something that is no {kind.__name__}")
        return self.stack[-1]


def _put(target: dict[str, Any], key: Any, value: Any) -> None:
    """Strings alone are keys: integers can be chosen so that a dictionary takes hours."""
    if not isinstance(key, str):
        raise ValueError(f"a key of type {type(key).__name__}")
    target[key] = value


Action = Callable[[_Machine, Any], Any]
ACTIONS: dict[str, Action] = {
    "GLOBAL": lambda machine, full: machine.name(full=full), "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call, "NEWOBJ": _Machine.call, "BUILD": _Machine.build,
    "BINPERSID": lambda machine, _: machine.stack.append(Made(PERSISTENT, (machine.stack.pop(),))),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine.stack.pop(), "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.short_tuple(1), "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": _Machine.dictionary, "SETITEM": _Machine.put_item, "SETITEMS": _Machine.put_items,
    "APPEND": _Machine.append, "APPENDS": _Machine.extend, "ADDITEMS": _Machine.extend,
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], _Machine.remember),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, at: machine.stack.append(machine.memo[at])),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
}
