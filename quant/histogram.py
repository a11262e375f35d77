"""A histogram that grows with what it is shown, and the int8 grid that fits it."""
import numpy as np
from jaxtyping import Float, Float32, Int64

from caphuman_edge.quant.rewrite import Grid

BINS = 4096  # even: neighbours are merged in twos when the range doubles
TRIED = np.linspace(0.3, 1.0, 36)  # shares of the full range that a grid may cover
LOW, HIGH = -128, 127


class Histogram:
    """Counts of values between -reach and reach, which is a power of two and doubles when a value lies beyond it."""

    def __init__(self, counts: Int64[np.ndarray, "bins"] | None = None, reach: float = 2.0**-20, low: float = 0.0,
                 high: float = 0.0):
        self.counts = np.zeros(BINS, np.int64) if counts is None else counts
        self.reach = reach
        self.low, self.high = low, high  # of the values; zero counts as one of them, since layers pad with it

    def add(self, values: Float32[np.ndarray, "..."]) -> None:
        """Count these values."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        while max(-self.low, self.high) > self.reach:
            self._double()
        places = ((values.reshape(-1) + np.float32(self.reach)) * np.float32(BINS / (2 * self.reach))).astype(np.int32)
        self.counts += np.bincount(np.minimum(places, BINS - 1, out=places), minlength=BINS)

    def grid(self, clip: float, affine: bool) -> Grid:
        """The grid that covers the share `clip` of the values, or for 0 the one of least squared error."""
        low, high = (self.low, self.high) if affine else (-max(-self.low, self.high), max(-self.low, self.high))
        if low == high:
            return Grid(1.0, 0)
        if clip:
            return self._covering(clip, affine)
        if not affine:
            return min((grid_of(low * share, high * share, False) for share in TRIED), key=self.squared_error)
        top = min(TRIED, key=lambda share: self.squared_error(grid_of(low, high * share, True)))
        return min((grid_of(low * share, high * top, True) for share in TRIED), key=self.squared_error)

    def squared_error(self, grid: Grid) -> float:
        """Sum over the values, as if each were at its bin's centre."""
        centres = self._centres()
        return float((self.counts * (rounded(centres, grid) - centres) ** 2).sum())

    def _covering(self, clip: float, affine: bool) -> Grid:
        """Half of what lies beyond lies beyond each end, or beyond the largest magnitude without zero point."""
        centres = self._centres()
        if affine:
            share = np.cumsum(self.counts) / self.counts.sum()
            low, high = centres[np.searchsorted(share, [(1 - clip) / 2, min(1.0, (1 + clip) / 2)])]
            return grid_of(min(0.0, max(low, self.low)), max(0.0, min(high, self.high)), affine)
        folded = self.counts[BINS // 2:] + self.counts[:BINS // 2][::-1]
        share = np.cumsum(folded) / folded.sum()
        high = centres[BINS // 2:][np.searchsorted(share, clip)]
        high = min(high, max(-self.low, self.high))
        return grid_of(-high, high, affine)

    def _double(self) -> None:
        inner = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.pad(inner, BINS // 4)
        self.reach *= 2

    def _centres(self) -> Float[np.ndarray, "bins"]:
        return (np.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach


def grid_of(low: float, high: float, affine: bool) -> Grid:
    """The grid from low to high; without a zero point it reaches as far on either side."""
    if not affine:
        return Grid(float(np.float32(max(-low, high) / HIGH)), 0)
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    return Grid(scale, int(np.clip(round(LOW - low / scale), LOW, HIGH)))


def rounded(values: Float[np.ndarray, "*n"], grid: Grid) -> Float[np.ndarray, "*n"]:
    """The nearest values on the grid, as QuantizeLinear and DequantizeLinear give them."""
    numbers = np.clip(np.rint(values / grid.scale) + grid.zero, LOW, HIGH)
    return (numbers - grid.zero) * grid.scale
