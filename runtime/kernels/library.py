"""The compiled kernels, if this machine has them."""
import ctypes
import functools
import importlib.machinery
from pathlib import Path

NAME = "_kernels"


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """What was compiled, if it was and can be loaded."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(NAME + suffix)
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # such as of another processor, or a C++ library that is missing: works without
                return None
            _declare(library)
            return library
    return None


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take and give."""
    pointer, length, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    library.caphuman_attention_kernels.restype = ctypes.c_char_p
    library.caphuman_attention_takes.argtypes = [ctypes.c_char_p, length]
    library.caphuman_attention.argtypes = [ctypes.c_char_p, *[pointer] * 4, *[length] * 5, number, whole]
    library.caphuman_group_norm.argtypes = [
        pointer, whole, *[length] * 3, *[pointer] * 2, number, whole, number, pointer, whole]
    library.caphuman_feed_forward.argtypes = [pointer, *[length] * 3, *[pointer] * 5, number, pointer, whole]
    library.caphuman_attention_block.argtypes = [
        pointer, *[length] * 4, *[pointer] * 5, length, *[pointer] * 2, whole, *[number] * 3, pointer, whole]
