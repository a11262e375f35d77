"""Light as nine spherical-harmonic coefficients a colour, in the order 1, x, y, z, xy, xz, yz, x2-y2, 3z2-1."""
import numpy as np
from jaxtyping import Float, Float32

from caphuman_edge.runtime.render.maps import SH_FACTORS, harmonics

# Expansion of max(0, cos) in Legendre polynomials: 1/4, 1/2 cos, 5/32 (3 cos^2 - 1) (Ramamoorthi and Hanrahan 2001)
CONSTANT, LINEAR, QUADRATIC = 1 / 4, 1 / 2, 5 / 32
DIRECTIONS = np.array([[np.cos(k) * np.sqrt(1 - z * z), np.sin(k) * np.sqrt(1 - z * z), z]
                       for k, z in enumerate(np.linspace(-0.95, 0.95, 20))])  # any nine that differ would do


def directional_light(azimuth: float, elevation: float, strength: float = 0.6, ambient: float = 0.55,
                      colour: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Float32[np.ndarray, "9 3"]:
    """A distant lamp and even light around it, for `HeadCode.lit`.

    azimuth: degrees, 0 from the viewer, + from image right; elevation: degrees, + from above; strength, ambient: 0 and
    up; colour: red, green and blue of both, 0..1. A white surface that faces the lamp shows about strength + ambient.
    """
    (side, ahead), (up, level) = ((np.sin(a), np.cos(a)) for a in np.radians([azimuth, elevation]))
    x, y, z = side * level, up, ahead * level
    shading = strength * np.array([
        CONSTANT, LINEAR * x, LINEAR * y, LINEAR * z, 6 * QUADRATIC * x * y, 6 * QUADRATIC * x * z,
        6 * QUADRATIC * y * z, 3 / 2 * QUADRATIC * (x * x - y * y), QUADRATIC / 2 * (3 * z * z - 1)])
    shading[0] += ambient
    return np.asarray(np.outer(shading / SH_FACTORS, colour), np.float32)


def turned_light(light: Float[np.ndarray, "9 3"], rotation: Float[np.ndarray, "3 3"]) -> Float32[np.ndarray, "9 3"]:
    """The same surroundings, turned: a surface that turns along is shaded as before.

    Exact, as turning mixes harmonics of one degree only: the shading in a few directions tells all coefficients.
    """
    shading = shading_basis(DIRECTIONS @ rotation) @ light
    return np.asarray(np.linalg.lstsq(shading_basis(DIRECTIONS), shading, rcond=None)[0], np.float32)


def shading_basis(normals: Float[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 9"]:
    """What each coefficient of the light adds to the shading of surfaces with these normals."""
    return np.asarray(harmonics(normals) * SH_FACTORS, np.float32)
