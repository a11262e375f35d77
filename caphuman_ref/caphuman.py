"""CapHuman: UNet, CapFace and the projections of face tokens, joined into one noise prediction.

State-dict names equal those of the official checkpoint (`model.diffusion_model.*`, `control_model.*`, ...).
Source: Liang et al. 2024, "CapHuman: Capture Your Moments in Parallel Universes".
"""
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.capface import CapFace
from caphuman_edge.ref.clip import TextEncoder, VisionEncoder
from caphuman_edge.ref.unet import UNet
from caphuman_edge.runtime.contract import RESIDUALS, Config, residual_levels

GATE_THRESHOLD = 0.5
POSE_CHANNELS = 3  # a pose map is an RGB picture


@dataclass(frozen=True)
class FaceCondition:
    """What CapFace needs of one person; constant over the steps of a portrait."""

    tokens: Float[Tensor, "b n ctx"]
    hint: Float[Tensor, "b ch h w"]
    gates: tuple[Tensor, ...]  # one a level, (b, 1, h / 2**k, w / 2**k), each cell 0 or 1


@dataclass(frozen=True)
class ControlSettings:
    """How strongly faces and pose act, and until when the face tokens are held back."""

    scales: tuple[float, ...] = (1.0,) * RESIDUALS  # of CapFace's residuals, middle last
    pose_scales: tuple[float, ...] = (1.0,) * RESIDUALS
    tau: int = 0  # face tokens are zero at timesteps > tau; 0 never drops them


DEFAULT_CONTROL = ControlSettings()


class CapHuman(nn.Module):
    """One model of any size; `encoders` (CLIP), `autoencoder` and `pose_net` are parts that may be left out."""

    def __init__(self, config: Config, encoders: bool = True, autoencoder: bool = True, pose_net: bool = False,
                 mask_bias: float | None = None):
        super().__init__()
        self.config = config
        latent_channels, context_width = config.vae.latent_channels, config.unet.context_width
        self.model = nn.ModuleDict({"diffusion_model": UNet(config.unet, latent_channels)})
        self.control_model = CapFace(config.unet, latent_channels, mask_bias=mask_bias)
        self.id_linear = nn.Linear(config.identity_width, context_width)
        self.img_linear = nn.Linear(config.vision.width, context_width)
        if encoders:
            self.cond_stage_model = nn.ModuleDict({"transformer": TextEncoder(config.text)})
            self.control_cond_stage_model = nn.ModuleDict({"transformer": VisionEncoder(config.vision)})
        if autoencoder:
            self.first_stage_model = Autoencoder(config.vae)
        if pose_net:
            pose_config = dataclasses.replace(config.unet, hint_channels=POSE_CHANNELS)
            self.pose_control_model = CapFace(pose_config, latent_channels, mask_head=False)

    @property
    def unet(self) -> UNet:
        return self.model["diffusion_model"]

    @property
    def text_encoder(self) -> TextEncoder:
        return self.cond_stage_model["transformer"]

    @property
    def image_encoder(self) -> VisionEncoder:
        return self.control_cond_stage_model["transformer"]

    def face_condition(self, maps: Float[Tensor, "b maps H W"], image_tokens: Float[Tensor, "b n vision"],
                       identity: Float[Tensor, "b id"]) -> FaceCondition:
        """Everything about one person that does not change from step to step."""
        hint = self.control_model.encode_hint(maps)
        gates = face_gates(self.control_model.predict_mask(hint), len(self.config.unet.channel_mult))
        return FaceCondition(self.face_tokens(image_tokens, identity), hint, gates)

    def face_tokens(self, image_tokens: Float[Tensor, "b n vision"],
                    identity: Float[Tensor, "b id"]) -> Float[Tensor, "b n+1 ctx"]:
        """Projected image tokens, then the projected identity vector as one more token."""
        return torch.cat([self.img_linear(image_tokens), self.id_linear(identity)[:, None]], dim=1)

    def forward(self, latent: Float[Tensor, "b c h w"], timestep: Num[Tensor, "#b"], text: Float[Tensor, "b n ctx"],
                faces: Sequence[FaceCondition] = (), pose_hints: Sequence[Float[Tensor, "b ch h w"]] = (),
                control: ControlSettings = DEFAULT_CONTROL) -> Float[Tensor, "b c h w"]:
        """The noise eps for any number of people. Pose hints come from `pose_control_model.encode_hint`.

        Pose hints act without a face too, where the official code ignores them.
        """
        runs = []
        if faces:
            runs.append(self.face_residuals(latent, timestep, faces, control))
        if pose_hints:
            runs.append(self.pose_residuals(latent, timestep, text, pose_hints, control.pose_scales))
        return self.unet(latent, timestep, text, _sum_lists(runs) if runs else None)

    def face_residuals(self, latent: Float[Tensor, "b c h w"], timestep: Num[Tensor, "#b"],
                       faces: Sequence[FaceCondition], control: ControlSettings = DEFAULT_CONTROL) -> list[Tensor]:
        """CapFace's residuals, scaled, gated by each person's own mask, and summed over people."""
        return _sum_lists([self._residuals_of(latent, timestep, face, control) for face in faces])

    def pose_residuals(self, latent: Float[Tensor, "b c h w"], timestep: Num[Tensor, "#b"],
                       text: Float[Tensor, "b n ctx"], hints: Sequence[Tensor],
                       scales: tuple[float, ...]) -> list[Tensor]:
        """The pose net's residuals, scaled and summed over hints. They act everywhere: no gate."""
        runs = [self.pose_control_model(latent, timestep, text, hint) for hint in hints]
        return [residual * scale for residual, scale in zip(_sum_lists(runs), scales, strict=True)]

    def _residuals_of(self, latent: Tensor, timestep: Tensor, face: FaceCondition,
                      control: ControlSettings) -> list[Tensor]:
        tokens = drop_tokens(face.tokens, timestep, control.tau)
        residuals = self.control_model(latent, timestep, tokens, face.hint)
        gates = [face.gates[level] for level in residual_levels(self.config.unet)]
        return [residual * (gate * scale)
                for residual, gate, scale in zip(residuals, gates, control.scales, strict=True)]


def face_gates(mask: Float[Tensor, "b 1 h w"], levels: int) -> tuple[Tensor, ...]:
    """0/1 gates of every level: the mask is resized first (bilinear, no antialias), then compared."""
    rows, columns = mask.shape[2:]
    sizes = [(rows >> k, columns >> k) for k in range(levels)]
    resized = [F.interpolate(mask, size, mode="bilinear", align_corners=False, antialias=False) for size in sizes]
    return tuple((probability > GATE_THRESHOLD).to(mask.dtype) for probability in resized)


def drop_tokens(tokens: Float[Tensor, "b n ctx"], timestep: Num[Tensor, "#b"], tau: int) -> Float[Tensor, "b n ctx"]:
    """Face tokens, or zeros for the samples whose timestep is still above tau (tau 0 drops nothing)."""
    if tau == 0:
        return tokens
    kept = (timestep <= tau).to(tokens.dtype)
    return tokens * kept[:, None, None]


def _sum_lists(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [sum(rest, first) for first, *rest in zip(*lists, strict=True)]
