"""What perception asks of a network: arrays by name in, arrays by name out, as in `runtime/contract.py`."""
from collections.abc import Callable

import numpy as np

Graph = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
