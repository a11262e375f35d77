"""The face that FaceNet sees equals what facenet-pytorch's MTCNN class cuts out."""
import numpy as np

from caphuman_edge.runtime.perception.identity import facenet_face


def standardised(face: np.ndarray) -> np.ndarray:
    """As the official tool hands it to the network; our graph does it itself."""
    return (face.transpose(2, 0, 1) - 127.5) / 128


def test_faces_in_boxes_equal_the_official_ones_over_the_border_too(golden):
    recorded = golden("facenet.npz")
    for box, wanted in zip(recorded["in/boxes"], recorded["out/x"][:-1], strict=True):
        np.testing.assert_array_equal(standardised(facenet_face(recorded["in/photo"], box)), wanted)


def test_without_a_face_the_whole_photo_is_fed_as_the_official_tool_feeds_it(golden):
    recorded = golden("facenet.npz")
    np.testing.assert_allclose(standardised(facenet_face(recorded["in/photo"], None)), recorded["out/x"][-1], atol=1e-6)
