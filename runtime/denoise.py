"""One noise prediction out of a bundle's graphs: people, a second control and guidance put together.

The fused graph serves one person. Everything else is a sum of residuals that the split graphs give: those of each
person are scaled and gated by that person's own mask, those of a second ControlNet are scaled alone.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from .backends import Arrays, Graph
from .contract import GATE, RESIDUALS
from .errors import BadInput
from .schedule import guided

Latent = Float32[np.ndarray, "1 c h w"]
Scales = Float32[np.ndarray, "13"]


@dataclass(frozen=True, eq=False)
class Conditions:
    """What steers a portrait and does not change from step to step."""

    text: Float32[np.ndarray, "texts n width"]  # the prompt's tokens; with guidance, the negative prompt's before them
    people: Sequence[Arrays]  # of each: hint, face_tokens and gate_0, ..., as the hint encoder gives them
    scales: Scales  # of CapFace's residuals, middle last
    guidance: float = 1.0
    identity_guidance: float = 1.0  # 1 as the official tool; see `Denoiser.eps`
    tau: int = 0  # face tokens are zero at timesteps above it; 0 never drops them
    enhancement: float = 0.0  # of the heads; see `Denoiser.eps`
    control_hints: Sequence[np.ndarray] = ()  # (1, d, h, w) each: of pictures for a second ControlNet
    control_scales: Scales | None = None  # of its residuals; None is 1

    @property
    def split(self) -> bool:
        """Whether the split graphs are needed."""
        return len(self.people) != 1 or self.enhancement != 0 or len(self.control_hints) > 0


class Denoiser:
    """eps of one step; `graph` loads a bundle's graph by name, `fused` says whether the fused one may be used."""

    def __init__(self, graph: Callable[[str], Graph], fused: bool):
        self.graph, self.fused = graph, fused

    def eps(self, latent: Latent, timestep: int, conditions: Conditions) -> Latent:
        """The guided prediction.

        Guidance pulls from the negative prompt to the prompt (Ho and Salimans 2022); both see the person, as in the
        official tool. Identity guidance pulls in the same way from nobody to the person, but where a head is alone:
        hair and surroundings stay the prompt's. With e(text, person) and the heads' finest gates m:
            e(negative, person) + g (e(prompt, person) - e(negative, person))
            + (i - 1) m (e(negative, person) - e(negative, nobody)).
        Without the mask this is InstructPix2Pix's form (Brooks et al. 2023, equation 3). It costs one more prediction.

        Enhancement is the paper's post-hoc head control: pi(head, person) + alpha pi(head, nobody), with CapFace
        without tokens for the paper's separate network.
        """
        dropped = bool(conditions.tau) and timestep > conditions.tau
        each = self.predict(latent, timestep, conditions, conditions.text, not dropped)
        eps = each if len(each) == 1 else guided(each[1:], each[:1], conditions.guidance)
        if dropped or conditions.identity_guidance == 1:
            return eps
        nobody = self.predict(latent, timestep, conditions, conditions.text[:1], False)
        heads = np.max([person[f"{GATE}0"] for person in conditions.people], axis=0)
        return eps + np.float32(conditions.identity_guidance - 1) * heads * (each[:1] - nobody)

    def predict(self, latent: Latent, timestep: int, conditions: Conditions, text: Float32[np.ndarray, "texts n width"],
                somebody: bool) -> Float32[np.ndarray, "texts c h w"]:
        """The unguided predictions for these texts; without `somebody` the people's tokens are left out, not heads."""
        step = {"latent": latent, "timestep": np.array([timestep], np.float32)}
        if conditions.split or not self.fused:
            return self._unet({**step, "text_tokens": text}, self._residuals(step, conditions, text, somebody))
        return self.graph("denoiser")({**step, "text_tokens": text, "scales": conditions.scales,
                                       **_seen(conditions.people[0], somebody)})["eps"]

    def _residuals(self, step: Arrays, conditions: Conditions, text: np.ndarray, somebody: bool) -> list[np.ndarray]:
        """The 13 sums, one row for all texts or one a text."""
        runs = [self._face_residuals(step, person, conditions, somebody) for person in conditions.people]
        scales = np.ones(RESIDUALS, np.float32) if conditions.control_scales is None else conditions.control_scales
        for hint in conditions.control_hints:
            raw = self.graph("controlnet")({**step, "text_tokens": text, "hint": hint})
            runs.append([residual * scale for residual, scale in zip(_ordered(raw), scales, strict=True)])
        return [np.asarray(sum(rest, first)) for first, *rest in zip(*runs, strict=True)]

    def _face_residuals(self, step: Arrays, person: Arrays, conditions: Conditions, somebody: bool) -> list[np.ndarray]:
        residuals = self._capface(step, _seen(person, somebody))
        if alpha := np.float32(conditions.enhancement):
            nobody = self._capface(step, _seen(person, False)) if somebody else residuals
            residuals = [residual + alpha * plain for residual, plain in zip(residuals, nobody, strict=True)]
        gates = {gate.shape[2:]: gate for name, gate in person.items() if name.startswith(GATE)}  # by rows, columns
        return [residual * (gates[residual.shape[2:]] * scale)
                for residual, scale in zip(residuals, conditions.scales, strict=True)]

    def _capface(self, step: Arrays, person: Arrays) -> list[np.ndarray]:
        graph = self.graph("capface")
        arrays = {**step, **person}
        return _ordered(graph({spec.name: arrays[spec.name] for spec in graph.inputs}))

    def _unet(self, step: Arrays, residuals: list[np.ndarray]) -> Float32[np.ndarray, "texts c h w"]:
        """All texts at once where they share the residuals, else one after the other."""
        unet, rows = self.graph("unet"), len(residuals[0])
        named = {f"residual_{k:02}": residual for k, residual in enumerate(residuals)}
        if rows == 1:
            return unet({**step, **named})["eps"]
        each = [unet({**step, "text_tokens": step["text_tokens"][k:k + 1],
                      **{name: residual[k:k + 1] for name, residual in named.items()}})["eps"] for k in range(rows)]
        return np.concatenate(each)


def scales_of(strength: float | Sequence[float], name: str = "strength") -> Scales:
    """One number for all 13 residuals, or 13; raises BadInput for another count, and outside 0 to 2."""
    values = np.atleast_1d(np.asarray(strength, np.float32))
    if values.shape not in ((1,), (RESIDUALS,)) or not ((values >= 0) & (values <= 2)).all():  # also refuses NaN
        raise BadInput(f"{name} is {strength}, expected 0 to 2, as one number or {RESIDUALS}")
    return np.broadcast_to(values, (RESIDUALS,)).astype(np.float32)


def within(person: Arrays, mask: Float32[np.ndarray, "h w"]) -> Arrays:
    """The person with its gates closed outside a mask of the frame, 0..1, which is averaged over each gate's cells."""
    return {name: array * _coarse(mask, *array.shape[2:]) if name.startswith(GATE) else array
            for name, array in person.items()}


def _coarse(mask: Float32[np.ndarray, "h w"], rows: int, columns: int) -> Float32[np.ndarray, "rows columns"]:
    """1 where more than half of a cell lies in the mask."""
    height, width = mask.shape
    mean = mask.reshape(rows, height // rows, columns, width // columns).mean(axis=(1, 3))
    return (mean > 0.5).astype(np.float32)


def _seen(person: Arrays, somebody: bool) -> Arrays:
    return person if somebody else {**person, "face_tokens": np.zeros_like(person["face_tokens"])}


def _ordered(residuals: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [residuals[name] for name in sorted(residuals)]
