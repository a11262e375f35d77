"""The open head's geometry: cut from MakeHuman's body, in metres, with identity, expression and joints.

Identity: every CC0 slider of MakeHuman is one independent normal variable; the principal components of the heads
they span are the basis. Sliders are brought into register first, so that no component moves, turns or scales the
head: that is the camera's work.
"""
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from caphuman_edge.export.makehuman import MakeHuman

PARTS = ("body", "helper-l-eye", "helper-r-eye", "helper-upper-teeth", "helper-lower-teeth", "helper-tongue")
METRES = 0.1  # in a decimetre
CROWN = 881  # a vertex on top of the head
COLLAR = (1496, 8180)  # two neighbours on the ring of edges at the foot of the neck, from its nape to the figure's left
NECK_MIDDLE = 14541  # a corner of the neck joint's cube: inside, a little above the collar
CROWN_TO_FOOT = 2.6  # dm below the crown of the base mesh
NECK_HALF_WIDTH = 0.9  # dm
FOOT = -0.108  # metres; height of the root joint
RACES, GENDERS = ("african", "asian", "caucasian"), ("female", "male")
ANCESTRY_SIGMA, AGE_SIGMA, ASYMMETRY = 0.4, 0.2, 0.3
SLIDER_SIGMA = {"head": 0.13, "forehead": 0.13, "eyebrows": 0.2, "eyes": 0.2, "nose": 0.2, "mouth": 0.2, "cheek": 0.2,
                "chin": 0.2, "ears": 0.1, "neck": 0.1, "asym": 0.1}  # standard deviation of a folder's sliders
NOT_A_HEAD = ("pointed", "ear-shape", "breast", "trunk", "head-age", "trans-in", "trans-out", "measure")
OPPOSITES = {"-decr": "-incr", "-down": "-up", "-in": "-out", "-backward": "-forward", "-concave": "-convex",
             "-compress": "-uncompress"}

Offsets = Float64[np.ndarray, "v 3"]  # metres
JOINTS = ("root", "neck", "jaw", "left eye", "right eye")
PARENTS = (-1, 0, 1, 1, 1)
JOINT_CUBES = {"neck": "head", "jaw": "mouth", "left eye": "l-eye", "right eye": "r-eye"}
BONES = {"jaw": "jaw", "eye.L": "left eye", "eye.R": "right eye", "head": "neck"}  # a bone's nearest ancestor decides
REGRESSED_FROM = 60  # vertices around a joint


@dataclass(frozen=True)
class HeadCut:
    """Which of MakeHuman's vertices the head keeps, and its triangles."""

    kept: Int64[np.ndarray, "v"]  # indices into the body's vertices; those of the collar are in it twice
    faces: Int64[np.ndarray, "f 3"]  # indices into `kept`
    face_corners: Int64[np.ndarray, "f 3"]  # indices into MakeHuman's texture coordinates
    face_parts: Int64[np.ndarray, "f"]  # indices into PARTS
    measured: Bool[np.ndarray, "v"]  # what identity, joints and landmarks are measured on; not the foot of the neck
    origin: Float64[np.ndarray, "3"]  # the joint between neck and head, dm

    def place(self, body: Float64[np.ndarray, "n 3"]) -> Offsets:
        """The head of one body, in metres about the joint between neck and head."""
        return np.asarray((body[self.kept] - self.origin) * METRES)

    def offsets(self, target: Float64[np.ndarray, "n 3"]) -> Offsets:
        """A target's offsets on the head, in metres."""
        return np.asarray(target[self.kept] * METRES)

    def part_vertices(self, part: str) -> Int64[np.ndarray, "p"]:
        """The vertices of one of PARTS."""
        return np.unique(self.faces[self.face_parts == PARTS.index(part)])


def cut_head(source: MakeHuman) -> HeadCut:
    """Keep face, skull and neck with eyes, teeth and tongue; close the neck; split each quad into two triangles."""
    skin = _skin(source)
    quads = [skin if part == "body" else source.parts[part] for part in PARTS]
    parts = np.repeat(np.arange(len(PARTS)), [len(q) for q in quads])
    corners = np.concatenate(quads)
    triangles = np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])
    kept, faces = np.unique(triangles[..., 0], return_inverse=True)
    measured = ~np.isin(kept, np.setdiff1d(skin[..., 0], _above_the_foot(source)[..., 0]))
    return HeadCut(kept % len(source.vertices), faces.reshape(-1, 3), triangles[..., 1], np.tile(parts, 2), measured,
                   source.joint("head"))


def mean_head(source: MakeHuman, cut: HeadCut) -> Offsets:
    """The young adult in the middle of MakeHuman's three ancestries and two genders, in metres."""
    adults = [source.target(f"macrodetails/{race}-{gender}-young") for race in RACES for gender in GENDERS]
    return cut.place(source.vertices + np.mean(adults, axis=0))


def flat_footed(mean: Float[np.ndarray, "v 3"]) -> Float[np.ndarray, "v 3"]:
    """With the foot of the neck pressed flat, as the first open head ended: what is measured on it stays the same."""
    return np.asarray(np.maximum(mean, np.array([-np.inf, FOOT, -np.inf], mean.dtype)))


def identity_basis(source: MakeHuman, cut: HeadCut, mean: Offsets, components: int) -> Float64[np.ndarray, "v 3 n"]:
    """Principal components of all sliders, scaled to one standard deviation, in metres, largest first.

    The front of the head counts fully, what lies behind it a quarter.
    """
    weight = np.where(mean[:, 2] > 0.04, 1.0, 0.25) * cut.measured
    sliders = np.stack([_in_register(offsets, flat_footed(mean), weight)
                        for offsets in _ancestry_sliders(source, cut) + _local_sliders(source, cut)])
    weighted = (sliders * weight[:, None]).reshape(len(sliders), -1)
    mixtures = np.linalg.eigh(weighted @ weighted.T)[1][:, ::-1]  # columns: orthonormal slider mixtures
    return np.moveaxis(np.tensordot(mixtures[:, :components].T, sliders, axes=1), 0, -1)


def expression_basis(source: MakeHuman, cut: HeadCut) -> tuple[list[str], Float64[np.ndarray, "v 3 n"]]:
    """The 52 ARKit face units: names, and offsets in metres at full strength."""
    names = source.face_unit_names()
    return names, np.stack([cut.offsets(source.face_unit(name)) for name in names], axis=-1)


def skinning_weights(source: MakeHuman, cut: HeadCut) -> Float64[np.ndarray, "v j"]:
    """MakeHuman's bones merged into the five FLAME joints; rows sum to 1."""
    weights = np.zeros((len(source.vertices), len(JOINTS)))
    parents = source.bone_parents()
    for bone, pairs in source.bone_weights().items():
        joint = JOINTS.index(_joint_of(bone, parents))
        for vertex, weight in pairs:
            weights[vertex, joint] += weight
    weights = weights[cut.kept]
    return weights / weights.sum(axis=1, keepdims=True)


def joint_regressor(source: MakeHuman, cut: HeadCut, mean: Offsets) -> Float64[np.ndarray, "j v"]:
    """Rows that give each joint from the vertices around it: least-norm weights that sum to 1."""
    regressor = np.zeros((len(JOINTS), len(mean)))
    for row, (joint, centre) in enumerate(_joint_centres(source, cut, mean).items()):
        near = _vertices_around(cut, mean, joint, centre)
        system = np.vstack([mean[near].T, np.ones(len(near))])
        uniform = np.full(len(near), 1 / len(near))
        regressor[row, near] = uniform + np.linalg.pinv(system) @ (np.append(centre, 1) - system @ uniform)
    return regressor


def _skin(source: MakeHuman) -> Int64[np.ndarray, "q 4 2"]:
    """The body above its collar, and quads that close the neck from below."""
    body = source.parts["body"]
    collar = _ring(body[..., 0], *COLLAR)
    head = body[_reached(body[..., 0], CROWN, collar)]
    texture = dict(head[np.isin(head[..., 0], collar)].tolist())  # of each vertex in the collar
    # Copies of the collar's vertices, as indices beyond the body's: with normals of their own the rim stays sharp.
    rim = np.array([(vertex + len(source.vertices), texture[vertex]) for vertex in collar])
    middle = np.tile([NECK_MIDDLE, texture[collar[0]]], (len(rim) // 2, 1))
    closing = np.stack([middle, rim[::2], rim[1::2], np.roll(rim, -2, axis=0)[::2]], axis=1)
    return np.concatenate([head, closing])


def _ring(quads: Int64[np.ndarray, "q 4"], first: int, second: int) -> list[int]:
    """Follow an edge straight on, from quad corner to quad corner, until it comes back to its start."""
    ring = [first, second]
    while ring[-1] != first:
        around = quads[(quads == ring[-1]).any(axis=1)]
        ahead = around[~(around == ring[-2]).any(axis=1)]
        ring += set(ahead[0].tolist()) & set(ahead[1].tolist()) - {ring[-1]}
    return ring[:-1]


def _reached(quads: Int64[np.ndarray, "q 4"], start: int, border: list[int]) -> Bool[np.ndarray, "q"]:
    """The quads that can be reached from a vertex without crossing the border."""
    inside, count = np.arange(quads.max() + 1) == start, 0
    while count < (count := inside.sum()):
        inside[quads[inside[quads].any(axis=1)]] = True
        inside[border] = False
    return np.asarray(inside[quads].any(axis=1))


def _above_the_foot(source: MakeHuman) -> Int64[np.ndarray, "q 4 2"]:
    body = source.parts["body"]
    corners = source.vertices[body[..., 0]]
    height = corners[..., 1].max() - corners[..., 1]
    inside = (height < CROWN_TO_FOOT) & (np.abs(corners[..., 0]) < NECK_HALF_WIDTH)
    return np.asarray(body[inside.any(axis=1)])


def _ancestry_sliders(source: MakeHuman, cut: HeadCut) -> list[Offsets]:
    """How each of the six young adults, and the old ones together, differ from their mean."""
    def heads(age: str) -> Float64[np.ndarray, "6 v 3"]:
        names = [f"macrodetails/{race}-{gender}-{age}" for race in RACES for gender in GENDERS]
        return np.stack([cut.offsets(source.target(name)) for name in names])

    young, old = heads("young"), heads("old")
    return [*ANCESTRY_SIGMA * (young - young.mean(axis=0)), AGE_SIGMA * (old - young).mean(axis=0)]


def _local_sliders(source: MakeHuman, cut: HeadCut) -> list[Offsets]:
    """One slider a pair of opposite targets; left and right move together, and a little apart."""
    sliders = []
    for folder, sigma in SLIDER_SIGMA.items():
        offsets = _two_way_offsets(source, cut, folder)
        for name, left in offsets.items():
            if name.startswith("l-"):
                right = offsets["r-" + name[2:]]
                sliders += [sigma * (left + right), ASYMMETRY * sigma * (left - right)]
            elif not name.startswith("r-"):
                sliders.append(sigma * left)
    return sliders


def _two_way_offsets(source: MakeHuman, cut: HeadCut, folder: str) -> dict[str, Offsets]:
    """Half the way from each target to its opposite; targets without an opposite as they are."""
    offsets = {name: cut.offsets(source.target(f"{folder}/{name}")) for name in source.target_names(folder)
               if not any(word in name for word in NOT_A_HEAD)}
    for less, more in OPPOSITES.items():
        for name in [name for name in offsets if name.endswith(less)]:
            opposite = offsets.pop(name.removesuffix(less) + more, None)
            if opposite is not None:
                offsets[name] = (opposite - offsets[name]) / 2
    return offsets


def _in_register(offsets: Offsets, mean: Offsets, weight: Float64[np.ndarray, "v"]) -> Offsets:
    """Take out the translation, rotation and scaling that a slider contains, to first order."""
    ones, zeros = np.ones(len(mean)), np.zeros(len(mean))
    x, y, z = mean.T
    motions = np.stack([  # (7, V, 3)
        np.stack(motion, axis=1) for motion in (
            (ones, zeros, zeros), (zeros, ones, zeros), (zeros, zeros, ones),
            (zeros, -z, y), (z, zeros, -x), (-y, x, zeros), (x, y, z))])
    weighted = (motions * weight[:, None]).reshape(7, -1)
    amounts = np.linalg.lstsq(weighted.T, (offsets * weight[:, None]).ravel(), rcond=None)[0]
    return np.asarray(offsets - np.tensordot(amounts, motions, axes=1))


def _joint_of(bone: str, parents: dict[str, str]) -> str:
    while bone and bone not in BONES:
        bone = parents[bone]
    return BONES.get(bone, "root")


def _joint_centres(source: MakeHuman, cut: HeadCut, mean: Offsets) -> dict[str, Float64[np.ndarray, "3"]]:
    """Joints of the mean head; eyes at their eyeballs' centres, the root at the foot of the neck."""
    adult = source.vertices + np.mean([source.target(f"macrodetails/{race}-{gender}-young")
                                       for race in RACES for gender in GENDERS], axis=0)
    centres = {name: (adult[np.unique(source.parts[f"joint-{cube}"][..., 0])].mean(axis=0) - cut.origin) * METRES
               for name, cube in JOINT_CUBES.items()}
    foot = np.array([0.0, FOOT, centres["neck"][2]])
    return {"root": foot} | centres


def _vertices_around(cut: HeadCut, mean: Offsets, joint: str,
                     centre: Float64[np.ndarray, "3"]) -> Int64[np.ndarray, "n"]:
    if "eye" in joint:
        return cut.part_vertices("helper-l-eye" if joint == "left eye" else "helper-r-eye")
    skin = np.intersect1d(cut.part_vertices("body"), np.flatnonzero(cut.measured))
    nearest = np.argsort(np.linalg.norm(mean[skin] - centre, axis=1), kind="stable")
    return np.asarray(skin[nearest[:REGRESSED_FROM]])
