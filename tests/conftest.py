"""Fixtures shared by every suite."""
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


@pytest.fixture
def golden() -> Callable[[str], Mapping[str, np.ndarray]]:
    """`golden("unet.npz")`: one recorded suite of arrays by key; skips where the file is not at hand.

    An array is decompressed each time it is asked for: keep it in a variable.
    """

    def load(name: str) -> Mapping[str, np.ndarray]:
        if not (GOLDEN / name).exists():
            pytest.skip(f"{name} is not in {GOLDEN}; set GOLDEN_DIR to a folder that has it")
        return _archive(GOLDEN / name)

    return load


@functools.cache
def _archive(path: Path) -> Mapping[str, np.ndarray]:
    return np.load(path, allow_pickle=False)
