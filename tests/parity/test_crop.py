"""The photo that DECA sees equals the official data set's, made with scikit-image."""
import json

import numpy as np
import pytest
from skimage.transform import resize

from caphuman_edge.runtime.perception.official_crop import (
    Square,
    crop_square,
    square_around,
    square_of_points,
    squash,
    whole_frame,
)


def cases(recorded) -> list[str]:
    """Every recorded case: a box of either kind, one over the border, no face, points from a file."""
    return [key.split("/")[1] for key in recorded if key.startswith("out/") and key.endswith("/image")]


def recorded_square(recorded, case: str) -> Square:
    """The square of a recorded case: its own 68 points, no face, or a box of one of the two kinds."""
    if case == "txtfile":
        return square_of_points(recorded["in/kpt68"])
    kind = json.loads(str(recorded["config"]))["cases"][case]["type"]
    box = recorded[f"in/{case}/bbox"]
    return square_around(box, kind) if len(box) == 4 else whole_frame()


def test_the_squashed_photo_equals_the_official_one_bit_by_bit(golden):
    recorded = golden("crop.npz")
    np.testing.assert_array_equal(squash(recorded["in/image"]), recorded["out/original_u8"])


def test_every_crop_equals_the_official_one(golden):
    recorded = golden("crop.npz")
    frame = recorded["out/original_u8"]
    for case in cases(recorded):
        crop = crop_square(frame, recorded_square(recorded, case))
        np.testing.assert_allclose(crop, recorded[f"out/{case}/image"], atol=1e-7, err_msg=case)


def test_both_transforms_equal_the_official_ones(golden):
    recorded = golden("crop.npz")
    for case in cases(recorded):
        square = recorded_square(recorded, case)
        for ours, official in ((square.to_crop, "tform"), (square.to_frame, "tform_decode")):
            np.testing.assert_allclose(ours, recorded[f"out/{case}/{official}"], rtol=2e-7, atol=1e-12, err_msg=case)


@pytest.mark.parametrize(("height", "width"), [(64, 100), (256, 256), (300, 700), (512, 512), (513, 511), (1999, 333)])
def test_squashing_equals_scikit_image_at_other_sizes(height, width):
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    photo[:height // 3] = 255  # flat areas are where a last bit decides
    photo[height // 3:height // 2] = 200
    wanted = (resize(photo, (512, 512), anti_aliasing=True) * 255).astype(np.uint8)
    np.testing.assert_array_equal(squash(photo), wanted)
