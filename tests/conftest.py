"""Fixtures shared by every suite."""
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("unet.npz")`: one recorded suite of arrays by key; skips where the file is not at hand."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = GOLDEN / name
        if not path.exists():
            pytest.skip(f"{name} is not in {GOLDEN}; set GOLDEN_DIR to a folder that has it")
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load
