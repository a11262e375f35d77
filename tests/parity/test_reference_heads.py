"""The reference's FLAME, texture space and renderer equal the official ones on recorded heads."""
import numpy as np
import pytest
import torch

from caphuman_edge.ref.flame import FLAME, FlameTexture, contour_row, rodrigues
from caphuman_edge.ref.rasterizer import SH_FACTORS, project, rasterize, render, to_frame, vertex_normals

TOLERANCE = 1e-5  # metres on a head of about one metre: float32 sums in another order
MAPS = ("normal", "albedo", "rendered")
CORNERS = torch.tensor([[[-1.0, -1, 5], [1, -1, 5], [-1, 1, 5]]])  # one face: the frame's upper left half


@pytest.fixture
def flame(golden):
    suite = golden("flame.npz")
    return FLAME({key.removeprefix("flame/"): suite[key] for key in suite if key.startswith("flame/")})


@pytest.fixture
def heads(golden, flame):
    """The recorded heads of flame.npz, ours."""
    return flame(*tensors(golden("flame.npz"), "in/shape", "in/exp", "in/pose"))


def tensors(suite, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(suite[name]) for name in names]


def test_buffers_are_the_official_ones(golden, flame):
    suite = golden("flame.npz")
    official = {key.removeprefix("sd/"): suite[key] for key in suite if key.startswith("sd/")}
    ours = flame.state_dict()
    assert ours.keys() == official.keys() | {"shapedirs"}
    for name, wanted in official.items():
        np.testing.assert_array_equal(ours[name], wanted, err_msg=name)


@pytest.mark.parametrize("part", ["vertices", "landmarks2d", "landmarks3d"])
def test_heads_and_landmarks_equal_the_official_ones(golden, heads, part):
    np.testing.assert_allclose(getattr(heads, part), golden("flame.npz")[f"out/{part}"], atol=TOLERANCE)


@pytest.mark.parametrize("part", ["vertices", "landmarks2d", "landmarks3d"])
def test_neck_and_eyes_turn_as_the_official_ones(golden, flame, part):
    suite = golden("flame.npz")
    recorded = [tensor[-4:] for tensor in tensors(suite, "in/shape", "in/exp", "in/pose")]
    turned = flame(*recorded, *tensors(suite, "in/neck_pose", "in/eye_pose"))
    np.testing.assert_allclose(getattr(turned, part), suite[f"out/neck_{part}"], atol=TOLERANCE)


def test_the_contour_slides_through_the_official_rows(golden, flame):
    suite = golden("flame.npz")
    rotations = flame.rotations(torch.from_numpy(suite["in/pose"]))
    np.testing.assert_array_equal(contour_row(rotations[:, 0] @ rotations[:, 1]), suite["out/dyn_index"])


def test_rotations_equal_the_official_rodrigues(golden):
    suite = golden("flame.npz")
    vectors = torch.from_numpy(np.concatenate([suite["in/pose"][:, :3], suite["in/pose"][:, 3:]]))
    np.testing.assert_allclose(rodrigues(vectors), suite["out/rodrigues"], atol=1e-6)


def test_textures_equal_the_official_ones(golden):
    suite = golden("flametex.npz")
    mean, basis = texture_file(52)
    np.testing.assert_array_equal(mean[::64, ::64], suite["in/mean_check"])
    basis[..., 50:] = 1e3  # beyond what DECA reads
    albedo = FlameTexture({"mean": mean, "tex_dir": basis})(torch.from_numpy(suite["in/texcode"]))
    np.testing.assert_allclose(albedo, suite["out/albedo"], atol=TOLERANCE)


def test_light_factors_are_the_recorded_ones(golden):
    np.testing.assert_allclose(SH_FACTORS, golden("render.npz")["in/constant_factor"], rtol=1e-6)


def test_the_float32_case_equals_pytorch3d_pixel_for_pixel(golden):
    suite = golden("render.npz")
    screen, = tensors(suite, "out/small128_c1/trans_verts")
    fragments = draw(suite, 1, *tensors(suite, "out/verts"), screen, 128).fragments
    np.testing.assert_array_equal(fragments.pix_to_face, suite["out/small128_c1/pix_to_face"])
    np.testing.assert_allclose(fragments.bary, suite["out/small128_c1/bary"], atol=TOLERANCE)
    np.testing.assert_allclose(fragments.zbuf, suite["out/small128_c1/zbuf"], atol=TOLERANCE)


@pytest.mark.parametrize("part", [*MAPS, "shading", "alpha", "grid"])
def test_maps_of_the_float32_case_equal_the_official_ones(golden, part):
    suite = golden("render.npz")
    maps = draw(suite, 1, *tensors(suite, "out/verts", "out/small128_c1/trans_verts"), 128)
    name = part if part == "grid" else f"{part}_images"
    np.testing.assert_allclose(getattr(maps, part), suite[f"out/small128_c1/{name}"], atol=TOLERANCE)


def test_vertex_normals_equal_the_official_ones(golden):
    suite = golden("render.npz")
    vertices, faces = tensors(suite, "out/verts", "in/faces")
    np.testing.assert_allclose(vertex_normals(vertices[1:2], faces[0]), suite["out/small128_c1/vertex_normals"],
                               atol=TOLERANCE)


def test_projection_to_the_picture_equals_the_official_one(golden, flame):
    suite = golden("render.npz")
    head = flame(*tensors(suite, "in/shape", "in/exp", "in/pose"))
    camera, tform, small = tensors(suite, "in/cam", "in/tform_decode", "in/tform_small")
    screen = to_frame(project(head.vertices, camera), tform, (512, 512))
    np.testing.assert_allclose(screen, suite["out/trans_verts"], atol=2e-5)
    np.testing.assert_allclose(to_frame(project(head.vertices, camera), small, (128, 128))[1:2],
                               suite["out/small128_c1/trans_verts"], atol=2e-5)
    for part in ("landmarks2d", "landmarks3d"):
        wanted = suite[f"out/{part}"]
        points = to_frame(project(getattr(head, part), camera), tform, (512, 512))[..., :wanted.shape[2]]
        np.testing.assert_allclose(points, wanted, atol=2e-5)


@pytest.mark.parametrize("case", range(4))
def test_full_size_maps_follow_from_the_code_as_in_the_official_decoder(golden, flame, case):
    """From shape, expression, pose, camera and crop to the maps: float32 rounds otherwise on the way, hence edges."""
    suite = golden("render.npz")
    code = [tensor[case:case + 1] for tensor in tensors(suite, "in/shape", "in/exp", "in/pose")]
    camera, tform = (tensor[case:case + 1] for tensor in tensors(suite, "in/cam", "in/tform_decode"))
    vertices = flame(*code).vertices
    maps = draw(suite, case, vertices, to_frame(project(vertices, camera), tform, (512, 512)), 512)
    covered, expected = maps.alpha[0, 0].bool().numpy(), suite[f"out/c{case}/alpha_images"][0, 0] > 0
    assert (covered != expected).mean() <= 2e-5
    official = np.concatenate([suite[f"out/c{case}/{name}_images"][0] for name in MAPS]).astype(np.float32)
    ours, both = maps.hint[0].numpy(), covered & expected
    for k, name in zip((0, 3, 6), MAPS, strict=True):
        assert psnr(ours[k:k + 3, both], official[k:k + 3, both]) >= 70, name  # float16 itself leaves 76 to 80
    assert not ours[:, ~covered].any()


def test_a_batch_is_drawn_as_its_meshes_are():
    mirrored = CORNERS * torch.tensor([-1, 1, 1])
    both = rasterize(torch.stack([CORNERS, mirrored]), 40, 70)
    for row, corners in enumerate((CORNERS, mirrored)):
        for together, alone in zip(both, rasterize(corners[None], 40, 70), strict=True):
            assert torch.equal(together[row], alone[0])
    assert not torch.equal(both.pix_to_face[0], both.pix_to_face[1])


def test_edges_belong_to_no_face_and_ties_go_to_the_first():
    nearer = CORNERS - torch.tensor([0, 0, 1])
    seen = rasterize(torch.cat([CORNERS, nearer, nearer])[None], 3, 3).pix_to_face[0]
    assert seen.tolist() == [[1, 1, -1], [1, -1, -1], [-1, -1, -1]]


def test_slivers_broken_faces_and_what_lies_behind_the_viewer_are_not_drawn():
    sliver = torch.tensor([[[-1, 1, 5], [1, 1, 5], [0, -1, 5]]]) * torch.tensor([4e-5, 4e-5, 1])  # of area 6e-9
    behind, broken = CORNERS - torch.tensor([0, 0, 6]), CORNERS * torch.nan
    seen = rasterize(torch.cat([sliver, broken, behind])[None], 5, 5)
    assert (seen.pix_to_face == -1).all()


def draw(suite, case: int, vertices: torch.Tensor, screen: torch.Tensor, size: int):
    """Maps of one recorded case; `vertices` and `screen` hold all four heads or that one."""
    chosen = [tensor if len(tensor) == 1 else tensor[case:case + 1] for tensor in (vertices, screen)]
    faces, uv, uv_faces, albedo, light = tensors(suite, "in/faces", "in/uvcoords_raw", "in/uvfaces", "in/albedo",
                                                 "in/light")
    return render(*chosen, faces[0].long(), uv[0][uv_faces[0].long()], albedo, light[case:case + 1], (size, size))


def texture_file(components: int):
    """FLAME_texture.npz's arrays by the closed formula in flametex.npz's config."""
    y, x = np.mgrid[:512, :512].astype(np.float64)
    channel = np.arange(3)
    slope_y, slope_x = np.array([2, 1, 4]), np.array([3, 5, 2])
    mean = 128 + 60 * np.cos(2 * np.pi * (slope_y * y[..., None] + slope_x * x[..., None]) / 512 + channel)
    mean = np.round(mean * 256) / 256
    basis = np.empty((512, 512, 3, components), np.float32)
    for k in range(components):
        phase = 2 * np.pi * ((k % 7 + 1) * x + (k % 5 + 1) * y) / 512 + 0.3 * k
        basis[..., k] = np.round(10 / (1 + k) * np.cos(phase[..., None] + 0.7 * channel) * 256) / 256
    return mean.astype(np.float32), basis


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    """Decibels against a peak of 1."""
    return float(-10 * np.log10(np.mean((actual - expected) ** 2)))
