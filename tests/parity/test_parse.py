"""The face on white equals the official parser's, from the same logits."""
import numpy as np
import pytest

from caphuman_edge.runtime.perception.parse import LARGEST_PARSED, face_on_white


def test_everything_but_the_face_is_white(golden):
    recorded = golden("bisenet.npz")
    for name in (key.split("/")[1] for key in recorded if key.startswith("in/")):
        image, logits = recorded[f"in/{name}/image"], recorded[f"out/{name}/logits"]

        def parser(feed, image=image, logits=logits):
            np.testing.assert_allclose(feed["image"][0], image.transpose(2, 0, 1) / 255, atol=1e-6)
            return {"logits": logits}

        np.testing.assert_array_equal(face_on_white(image, parser, edge=None), recorded[f"out/{name}/masked_image"])


@pytest.mark.parametrize(("height", "width", "edge", "parsed"), [
    (1600, 2400, None, (1155, 1732)),  # two megapixels
    (1600, 2400, 512, (512, 768)),
    (160, 240, 512, (512, 768)),
    (300, 8000, 512, (274, 7303)),
])
def test_a_photo_is_parsed_at_another_size_and_keeps_its_own_pixels(height, width, edge, parsed):
    photo = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    seen = []

    def left_half_is_skin(feed):
        seen.append(feed["image"].shape[2:])
        logits = np.zeros((1, 19, *feed["image"].shape[2:]), np.float32)
        logits[..., :logits.shape[3] // 2] = (np.arange(19) == 1)[:, None, None]
        return {"logits": logits}

    alone = face_on_white(photo, left_half_is_skin, edge)
    assert seen == [parsed]
    assert parsed[0] * parsed[1] < 1.01 * LARGEST_PARSED
    middle = width // 2
    np.testing.assert_array_equal(alone[:, :middle - 3], photo[:, :middle - 3])
    assert (alone[:, middle + 3:] == 255).all()
