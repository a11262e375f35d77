"""How alike two pictures are: PSNR, and the structural similarity of Wang et al. 2004 ("Image quality assessment")."""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from caphuman_edge.runtime.selftest import EXACT

SIGMA, RADIUS = 1.5, 5  # px: the Gaussian window of 11 x 11
K1, K2, PEAK = 0.01, 0.03, 255.0


def picture_psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of (h, w, 3) uint8 pictures; EXACT where they are equal."""
    error = np.mean((found.astype(np.float64) - wanted) ** 2)
    return EXACT if error == 0 else float(min(EXACT, 10 * np.log10(PEAK**2 / error)))


def ssim(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean structural similarity of (h, w, 3) uint8 pictures, over the channels and all windows within the frame.

    Equation 13 with the paper's Gaussian window and biased moments, as scikit-image has it with gaussian_weights.
    """
    x, y = (picture.astype(np.float64).transpose(2, 0, 1) for picture in (found, wanted))
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def _windowed(image: np.ndarray) -> np.ndarray:
    """(c, h, w) to (c, h - 10, w - 10): means under the Gaussian, rows and columns in turn."""
    weights = np.exp(-np.arange(-RADIUS, RADIUS + 1) ** 2 / (2 * SIGMA**2))
    weights /= weights.sum()
    rows = sliding_window_view(image, len(weights), axis=1) @ weights
    return sliding_window_view(rows, len(weights), axis=2) @ weights
