"""From one photo, a head and a prompt to a portrait. Only this file knows the order of the stages."""
import dataclasses
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8

from .backends import Arrays, Graph
from .bundle import Bundle
from .cache import sha256_of
from .condition import condition_maps
from .contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, RESIDUALS
from .errors import BadInput
from .framing import Fit
from .head import OPEN_HEAD, DecaEncoder, HeadCode, HeadFitter, HeadModel, is_flame, load_head
from .image import load_photo, resize, save_png
from .machine import Machine, split_eps
from .noise import cuda_normal
from .perceive import Subject, measure_subject
from .perception import InsightFace, Perception
from .render import Renderer, open_renderer
from .schedule import ddim_step, ddim_steps, guided, timesteps
from .tokenizer import Tokenizer

HEAD_ENCODER = "head_encoder"  # DECA: of use to FLAME heads alone


@dataclass(frozen=True)
class Settings:
    """Everything about one portrait but the person and the head. None takes the bundle's default."""

    prompt: str = ""
    negative: str = ""
    seed: int = 12345
    steps: int | None = None
    guidance: float | None = None  # 1 switches guidance off
    strength: float = 1.0  # of all 13 CapFace residuals
    tau: int = 0  # face tokens are dropped at timesteps above it; 0 never drops them
    eta: float = 0.0  # 0 deterministic, 1 ancestral


@dataclass(frozen=True)
class Portrait:
    """A finished picture and its recipe: settings, head, bundle. With the same photo they make it again."""

    pixels: UInt8[np.ndarray, "h w 3"]
    recipe: dict[str, object]

    def save(self, path: str | Path) -> None:
        """Write a PNG with the recipe in its text metadata."""
        save_png(path, self.pixels, {"caphuman": json.dumps(self.recipe), "AI-generated": "true"})


@dataclass(frozen=True, eq=False)
class Step:
    """The state after one denoising step."""

    index: int  # from 0
    count: int
    timestep: int
    clean: Float32[np.ndarray, "1 c h w"]  # the clean latent that this step predicts
    latent: Float32[np.ndarray, "1 c h w"]
    pipeline: "Pipeline" = field(repr=False)
    recipe: dict[str, object] = field(repr=False)

    @property
    def last(self) -> bool:
        """Whether the portrait is finished."""
        return self.index == self.count - 1

    def preview(self) -> UInt8[np.ndarray, "h w 3"]:
        """A cheap, coarse picture of what this step predicts, at full size."""
        coarse = self.pipeline.decode(self.clean, "preview_decoder")
        return resize(coarse, self.pipeline.bundle.config.height, self.pipeline.bundle.config.width, "bicubic")

    @property
    def image(self) -> Portrait:
        """The portrait; before the last step, what it would be if one stopped here."""
        return Portrait(self.pipeline.decode(self.latent if self.last else self.clean, "vae_decoder"), self.recipe)


class Pipeline:
    """A bundle ready to use; graphs load when first needed and stay loaded.

    `head` is the file of a head model to draw with in place of the bundle's; `detector` is what finds faces, "insight"
    where the insightface extra and a model pack of the user's are there. Backend, device, threads and precision are
    `machine.Machine`'s.
    """

    def __init__(self, bundle: Bundle, backend: str = "ort", threads: int | None = None,
                 renderer: Literal["auto", "gl", "numpy"] = "auto", head: Path | None = None,
                 detector: Literal["landmarker", "insight"] = "landmarker", device: str | None = None,
                 precision: str | None = None):
        self.bundle, self.machine = bundle, Machine(backend, device, threads, precision)
        self.machine.check()
        self.head_file = head or (bundle.file("head") if "head" in bundle else OPEN_HEAD)
        self.head_model: HeadModel = load_head(self.head_file)
        self.tokenizer = Tokenizer(bundle.file("tokenizer")) if "tokenizer" in bundle else Tokenizer()
        self._insight = InsightFace() if detector == "insight" else None
        self.renderer: Renderer = open_renderer(renderer)  # last: a failure above leaves no context open
        self._graphs: dict[str, Graph] = {}

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the renderer; the pipeline draws nothing afterwards."""
        self.renderer.close()

    @cached_property
    def see(self) -> Perception:
        """What finds and measures faces."""
        names = [name for name in OFFICIAL_GRAPHS if name in self.bundle and name != HEAD_ENCODER]
        official = {name: self.graph(name) for name in names}
        needed = {name: self.graph(name) for name in PERCEPTION_GRAPHS}
        return Perception(**needed, identity_size=self.bundle.config.identity_size, official=official,
                          insight=self._insight)

    @cached_property
    def heads(self) -> HeadFitter | DecaEncoder:
        """Reads heads off photos: DECA where the bundle has it and the head is FLAME's, or a fit to landmarks.

        Raises ShapeMismatch for another head without the landmarker's points.
        """
        if is_flame(self.head_model.layout) and HEAD_ENCODER in self.bundle:
            return DecaEncoder(self.graph(HEAD_ENCODER), self.head_model.layout)
        return HeadFitter(self.head_model)

    @cached_property
    def denoiser(self) -> tuple[str, ...]:
        """The graphs of a step, fused or split. Raises BundleError where the backend can run neither."""
        return self.machine.denoiser(self.bundle)

    def perceive(self, photo: str | Path | UInt8[np.ndarray, "h w 3"], face: int | None = None,
                 fit: Fit = "face") -> Subject:
        """Measure the person in a photo; settings as in `perceive.measure_subject`."""
        pixels = photo if isinstance(photo, np.ndarray) else load_photo(photo)
        config = self.bundle.config
        return measure_subject(self.see, self.heads, pixels, config.vision.image_size, face, fit,
                               config.width / config.height)

    def maps(self, head: HeadCode) -> Float32[np.ndarray, "9 h w"]:
        """Normal, albedo and rendered maps of a head in the bundle's frame; a head outside of it is warned of."""
        maps = condition_maps(self.renderer, self.head_model, head, self.bundle.config.height, self.bundle.config.width)
        if not maps.any():
            warnings.warn("the head lies outside the frame, so nothing steers the portrait; move it back", stacklevel=2)
        return maps

    def generate(self, subject: Subject, head: HeadCode | None = None, settings: Settings | None = None,
                 **changes: object) -> Iterator[Step]:
        """Denoise step by step; closing the generator cancels. `changes` are fields of Settings.

        `head` is None for the subject's own. Raises BadInput for settings out of range.
        """
        chosen = self.settings(settings, **changes)
        steps = ddim_steps(self.bundle.schedule, chosen.steps or 0, chosen.eta)
        drawn = subject.head if head is None else head
        constants, recipe = self._constants(subject, drawn, chosen), self._recipe(drawn, chosen)
        shape = (1, *self.bundle.config.latent_shape)
        latent = cuda_normal(chosen.seed, shape)
        for index, step in enumerate(steps):
            eps = self._eps(latent, step.timestep, constants, chosen)
            # the official generator draws at every step; a counter-based one can leave out the draws nobody uses
            noise = cuda_normal(chosen.seed, shape, offset=1 + index) if step.sigma else None
            latent, clean = ddim_step(latent, eps, step, noise)
            yield Step(index, len(steps), step.timestep, clean, latent, self, recipe)

    def settings(self, settings: Settings | None = None, **changes: object) -> Settings:
        """Settings with the bundle's defaults filled in, checked.

        Raises BadInput for one out of range, BundleError where the backend cannot run the bundle's denoiser.
        """
        schedule, _ = self.bundle.schedule, self.denoiser  # the latter only to refuse before a photo is measured
        given = dataclasses.replace(settings or Settings(), **changes)  # type: ignore[arg-type]
        chosen = dataclasses.replace(given, steps=schedule.steps if given.steps is None else given.steps,
                                     guidance=schedule.guidance if given.guidance is None else given.guidance)
        for name, low, high in (("guidance", 0, 30), ("strength", 0, 2), ("tau", 0, 1000), ("eta", 0, 1),
                                ("seed", 0, 2**63 - 1)):
            value = getattr(chosen, name)
            if not low <= value <= high:  # also refuses NaN
                raise BadInput(f"{name} is {value}, expected {low} to {high}")
        timesteps(chosen.steps or 0, schedule.train_steps)  # refuses what cannot be laid out
        return chosen

    def decode(self, latent: Float32[np.ndarray, "1 c h w"], decoder: str) -> UInt8[np.ndarray, "H W 3"]:
        """A scaled latent as pixels, truncated as the official tool does."""
        sample = self.graph(decoder)({"latent_sample": latent})["sample"][0]
        return np.clip(sample * 127.5 + 127.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)

    def graph(self, name: str) -> Graph:
        """A graph of the bundle, loaded once."""
        if name not in self._graphs:
            self._graphs[name] = self.machine.load(self.bundle, name)
        return self._graphs[name]

    def _constants(self, subject: Subject, head: HeadCode, settings: Settings) -> Arrays:
        """What the denoiser reads at every step and no step changes."""
        tokens = self.graph("image_encoder")({"pixel_values": subject.face_crop[None]})["last_hidden_state"]
        person = self.graph("hint_encoder")({"maps": self.maps(head)[None], "image_tokens": tokens,
                                             "identity": subject.identity[None]})
        del person["mask"]
        scales = np.full(RESIDUALS, settings.strength, np.float32)
        return {**person, "text_tokens": self._text_tokens(settings), "scales": scales}

    def _text_tokens(self, settings: Settings) -> Float32[np.ndarray, "b n c"]:
        """The prompt's tokens; with guidance, the negative prompt's before them."""
        texts = [settings.prompt] if settings.guidance == 1 else [settings.negative, settings.prompt]
        ids = np.concatenate([self.tokenizer.encode(text) for text in texts])
        return self.graph("text_encoder")({"input_ids": ids})["last_hidden_state"]

    def _eps(self, latent: Float32[np.ndarray, "1 c h w"], timestep: int, constants: Arrays,
             settings: Settings) -> Float32[np.ndarray, "1 c h w"]:
        step: Arrays = {"latent": latent, "timestep": np.array([timestep], np.float32)}
        if settings.tau and timestep > settings.tau:
            step["face_tokens"] = np.zeros_like(constants["face_tokens"])
        inputs, parts = {**constants, **step}, [self.graph(name) for name in self.denoiser]
        eps = parts[0](inputs)["eps"] if len(parts) == 1 else split_eps(parts[0], parts[1], inputs)
        return eps if len(eps) == 1 else guided(eps[1:], eps[:1], settings.guidance or 0.0)

    def _recipe(self, head: HeadCode, settings: Settings) -> dict[str, object]:
        (head_digest,) = sha256_of([self.head_file]).values()  # no path: the picture may be shared
        return {**dataclasses.asdict(settings), "backend": self.machine.backend,
                "device": self.machine.device, "precision": self.machine.precision,
                "head": head.numbers(), "head_sha256": head_digest,
                "bundle": self.bundle.manifest.name, "bundle_sha256": self.bundle.digest,
                "made_with": f"caphuman-edge {version('caphuman-edge')}"}
