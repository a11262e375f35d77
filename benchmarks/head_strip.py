"""A strip of pictures of the open head, to look at: turned, with expressions, under three lights; normals below.

    python -m benchmarks.head_strip --out docs/head_strip.jpg
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from caphuman_edge.runtime.condition import condition_maps
from caphuman_edge.runtime.head import HeadCode, HeadModel, directional_light, load_head
from caphuman_edge.runtime.render import Renderer, open_renderer
from caphuman_edge.runtime.sheet import Tile, contact_sheet, map_pictures

SIZE = 768  # px drawn; shown smaller, which smooths the edges
SHOWN = 256  # px
COLUMNS = 7
QUALITY = 90  # of the JPEG
YAWS = (-60.0, -40.0, -20.0, 0.0, 20.0, 40.0, 60.0)  # degrees
LIGHTS = {"light from image left": (-60.0, 10.0), "from image right": (60.0, 10.0), "from above": (0.0, 70.0)}
EXPRESSIONS = {"smile": {"smile": 0.8}, "open mouth": {"open": 0.7}, "blink": {"blink": 1.0}}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_strip", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    Image.fromarray(strip(load_head(), open_renderer())).save(options.out, quality=QUALITY)


def strip(model: HeadModel, renderer: Renderer) -> np.ndarray:
    """(h, w, 3) uint8: rows of rendered maps, the normal maps under each."""
    shown = [(name, _maps(renderer, model, code)) for name, code in codes(model).items()]
    tiles = [Tile(name, maps[kind]) for start in range(0, len(shown), COLUMNS) for kind in ("rendered", "normal")
             for name, maps in shown[start:start + COLUMNS]]
    return contact_sheet(tiles, COLUMNS)


def codes(model: HeadModel) -> dict[str, HeadCode]:
    """The heads to draw, by name."""
    neutral = HeadCode.neutral(model.layout).moved(y=-0.1, scale=1.45)
    return {**{f"yaw {yaw:+.0f}": neutral.posed(yaw=yaw) for yaw in YAWS},
            **{name: neutral.expressed(strengths) for name, strengths in EXPRESSIONS.items()},
            **{name: neutral.lit(directional_light(*angles)) for name, angles in LIGHTS.items()},
            "open mouth, yaw +30": neutral.expressed({"open": 0.7}).posed(yaw=30.0)}


def _maps(renderer: Renderer, model: HeadModel, code: HeadCode) -> dict[str, np.ndarray]:
    pictures = map_pictures(condition_maps(renderer, model, code, SIZE, SIZE))
    return {kind: np.asarray(Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.BOX))
            for kind, pixels in pictures.items()}


if __name__ == "__main__":
    main()
