"""MTCNN's area means equal torch's, which facenet-pytorch scales with."""
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from caphuman_edge.runtime.perception.mtcnn import area_resize


@pytest.mark.parametrize(("size", "wanted"), [((97, 61), (24, 24)), ((300, 211), (181, 127)), ((7, 19), (24, 24))])
def test_area_means_equal_torchs_down_and_up(size, wanted):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    official = interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size=wanted, mode="area")
    np.testing.assert_allclose(area_resize(image, *wanted), official[0].permute(1, 2, 0), atol=1e-4)
