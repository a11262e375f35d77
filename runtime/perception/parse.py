"""The face alone, on white, by BiSeNet's labels (Yu et al. 2018, arXiv 1808.00897, trained on CelebAMask-HQ)."""
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from caphuman_edge.runtime.perception.graph import Graph

# Background, ears, earrings, neck, necklace, clothes, hair, hat. Skin, brows, eyes, glasses, nose, mouth stay.
NOT_FACE = (0, 7, 8, 9, 14, 15, 16, 17, 18)
LARGEST_PARSED = 2_000_000  # px; the network's memory grows with the picture, 19 labels a pixel
TRAINED_EDGE = 512  # px; in its training pictures a face fills most of that


def face_on_white(image: UInt8[np.ndarray, "h w 3"], parser: Graph,
                  edge: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """The picture, white where it shows no face.

    It is parsed in a copy with this shorter edge. None parses the picture's own pixels, as the official tool does; a
    face much smaller than in the network's training pictures then comes out with holes. A picture of more than
    LARGEST_PARSED pixels is parsed smaller in any case.
    """
    height, width = image.shape[:2]
    wanted = 1.0 if edge is None else edge / min(height, width)
    scale = min(wanted, (LARGEST_PARSED / (height * width)) ** 0.5)
    picture = Image.fromarray(image)
    copy = picture.resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC)
    outline = Image.fromarray(face_mask(np.asarray(copy), parser).astype(np.uint8) * 255)
    mask = np.asarray(outline.resize(picture.size, Image.Resampling.BILINEAR)) > 127
    return np.where(mask[..., None], image, np.uint8(255))


def face_mask(image: UInt8[np.ndarray, "h w 3"], parser: Graph) -> Bool[np.ndarray, "h w"]:
    """True where the likeliest label belongs to the face."""
    return ~np.isin(part_labels(image, parser), NOT_FACE)


def part_labels(image: UInt8[np.ndarray, "h w 3"], parser: Graph) -> UInt8[np.ndarray, "h w"]:
    """Each pixel's likeliest of the parser's 19 labels, at the picture's own size."""
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
    return parser({"image": pixels})["logits"][0].argmax(axis=0).astype(np.uint8)
