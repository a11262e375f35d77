"""From photos, heads and a prompt to a portrait. Only this file knows the order of the stages."""
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from .backends import Arrays, Graph
from .bundle import Bundle
from .cache import sha256_of
from .canvas import Canvas, Known, drawn_cells
from .condition import condition_maps, landmark_picture
from .contract import OFFICIAL_GRAPHS, PERCEPTION_GRAPHS, TEXT_TOKENS
from .denoise import Conditions, Denoiser, scales_of, within
from .errors import BadInput, BundleError
from .framing import Fit
from .head import OPEN_HEAD, DecaEncoder, HeadCode, HeadFitter, HeadModel, is_flame, load_head
from .image import load_photo, resize
from .machine import EACH_STEP, FUSED, Machine, Memory
from .noise import cuda_normal
from .pages import give_back
from .perceive import Subject, array_sha256, measure_subject
from .perception import InsightFace, Perception
from .portrait import Step
from .prompt import most_windows, text_tokens
from .render import Renderer, open_renderer
from .request import DECODERS, KL, Person, Settings, complete, decoder_of, sampling
from .samplers import DISTILLED, lay_out, sample
from .schedule import SamplerStep
from .tiles import in_tiles
from .tokenizer import Tokenizer

HEAD_ENCODER = "head_encoder"  # DECA: of use to FLAME heads alone
CONTROL = ("control_encoder", "controlnet")  # the graphs of a second control
TOGETHER = (*PERCEPTION_GRAPHS, *OFFICIAL_GRAPHS, "preview_decoder")  # small: they put no other graph out of memory
REMEMBERED = 8  # results of encoders: portraits in a row often share photo or prompt
REMEDIES = {**dict.fromkeys(CONTROL, "build it with --controlnet"),  # where a bundle lacks a graph
            "tiny_decoder": "leave --decoder out, or build it with --tiny-decoder"}
Predictor = Callable[[Float32[np.ndarray, "1 c h w"], int], Float32[np.ndarray, "1 c h w"]]


class Pipeline:
    """A bundle ready to use; graphs load when first needed and stay loaded as long as `memory` says.

    `head` is the file of a head model to draw with in place of the bundle's; `detector` is what finds faces, "insight"
    where the insightface extra and a model pack of the user's are there. Backend, device, threads, precision and
    memory are `machine.Machine`'s.
    """

    def __init__(self, bundle: Bundle, backend: str = "ort", threads: int | None = None,
                 renderer: Literal["auto", "gl", "numpy"] = "auto", head: Path | None = None,
                 detector: Literal["landmarker", "insight"] = "landmarker", device: str | None = None,
                 precision: str | None = None, memory: Memory = "keep"):
        self.bundle = bundle
        self.machine = Machine(backend, device, threads, precision, memory=memory)
        self.machine.check()
        self.head_file = head or (bundle.file("head") if "head" in bundle else OPEN_HEAD)
        self.head_model: HeadModel = load_head(self.head_file)
        self.tokenizer = Tokenizer(bundle.file("tokenizer")) if "tokenizer" in bundle else Tokenizer()
        self._insight = InsightFace() if detector == "insight" else None
        self.renderer: Renderer = open_renderer(renderer)  # last: a failure above leaves no context open
        self._graphs: dict[str, Graph] = {}
        self._ahead: dict[str, Future[Graph]] = {}
        self._loader = ThreadPoolExecutor(1, "caphuman-loader")
        self._encoded: dict[tuple[str, ...], Arrays] = {}

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the renderer; the pipeline draws nothing afterwards."""
        self._loader.shutdown(wait=False, cancel_futures=True)
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

    def perceive(self, photo: str | Path | UInt8[np.ndarray, "h w 3"], face: int | None = None,
                 fit: Fit = "face") -> Subject:
        """Measure the person in a photo; settings as in `perceive.measure_subject`."""
        pixels = photo if isinstance(photo, np.ndarray) else load_photo(photo)
        config = self.bundle.config
        subject = measure_subject(self.see, self.heads, pixels, config.vision.image_size, face, fit,
                                  config.width / config.height)
        if self.machine.memory == "stage":
            self._forget()
        return subject

    def maps(self, head: HeadCode) -> Float32[np.ndarray, "9 h w"]:
        """Normal, albedo and rendered maps of a head in the bundle's frame; a head outside of it is warned of."""
        maps = condition_maps(self.renderer, self.head_model, head, self.bundle.config.height, self.bundle.config.width)
        if not maps.any():
            warnings.warn("the head lies outside the frame, so nothing steers the portrait; move it back", stacklevel=2)
        return maps

    def generate(self, people: Subject | Sequence[Person], head: HeadCode | None = None,
                 settings: Settings | None = None, *, canvas: Canvas | None = None,
                 control: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"] | None = None,
                 **changes: object) -> Iterator[Step]:
        """Denoise step by step; closing the generator cancels. `changes` are fields of Settings.

        `people`: one subject, whose `head` is None for its own, or any number of Persons with heads and masks. `canvas`
        is a photo to draw over. `control` is the picture for the bundle's second ControlNet: RGB, 0..255 as bytes or
        0..1, stretched over the frame. Raises BadInput for settings out of range, BundleError where the bundle or the
        backend lacks what they need.
        """
        persons = [Person(people, head)] if isinstance(people, Subject) else list(people)
        chosen = self.settings(settings, len(persons), canvas is not None, control is not None, **changes)
        self._warn_of_sampler(chosen)
        self.prepare(chosen, len(persons), control is not None)
        conditions, recipe = self._conditions(persons, chosen, control), self._recipe(persons, chosen, canvas, control)
        table = lay_out(sampling(chosen, self.bundle.schedule), chosen.steps or 0, chosen.eta or 0.0)
        steps = _walked(table, chosen.denoise or 0.0)
        latent = noise = cuda_normal(chosen.seed, (1, *self.bundle.config.latent_shape))
        known = self._known(canvas, noise) if canvas else None
        if known and chosen.denoise != 1:
            latent = known.noisy(steps[0].alpha)
        yield from self._walk(latent, steps, conditions, known, chosen, recipe, canvas)

    def predictor(self, people: Subject | Sequence[Person], head: HeadCode | None = None,
                  settings: Settings | None = None, **changes: object) -> Predictor:
        """What `generate` asks for at each step, the guided noise predicted in a latent at a timestep, as a function.

        For who compares or records predictions at latents of their own choice.
        """
        persons = [Person(people, head)] if isinstance(people, Subject) else list(people)
        conditions = self._conditions(persons, self.settings(settings, len(persons), False, False, **changes), None)
        denoiser = self._denoiser(conditions)
        return lambda latent, timestep: denoiser.eps(latent, timestep, conditions)

    def settings(self, settings: Settings | None = None, people: int = 1, canvas: bool = False, control: bool = False,
                 **changes: object) -> Settings:
        """Settings with the bundle's defaults filled in, checked, before any photo is measured.

        `people`, `canvas` and `control` say what is drawn. Raises BadInput for a setting out of range, BundleError
        where the bundle or the backend lacks a graph for it.
        """
        if people < 1:
            raise BadInput("nobody is asked for, expected one person or more; pass a subject")
        given = dataclasses.replace(settings or Settings(), **changes)  # type: ignore[arg-type]
        chosen = complete(given, self.bundle.schedule, canvas)
        self._each_step(chosen, people, control)
        needed = [*(CONTROL if control else ()), *(["vae_encoder"] if canvas else []), decoder_of(chosen)]
        if missing := [name for name in needed if name not in self.bundle]:
            remedy = REMEDIES.get(missing[0], "build it with this version")
            raise BundleError(f"bundle {self.bundle.root} has no {missing[0]}, which this needs; {remedy}")
        return chosen

    def prepare(self, settings: Settings, people: int = 1, control: bool = False) -> None:
        """Begin to load, on another thread, what runs at each step, with settings that `settings` gave.

        `generate` does so itself, before anything is encoded; called before photos are measured, it gains that time,
        too. What fails is raised where the graph is needed. Does nothing where memory is held by the stage.
        """
        if self.machine.memory == "stage":
            return
        loading = self._graphs.keys() | self._ahead.keys()
        names = [name for name in self._each_step(settings, people, control) if name not in loading]
        if not names:
            return
        texts = _texts(settings)
        with warnings.catch_warnings():  # of a long prompt, which its encoding warns of
            warnings.simplefilter("ignore")
            count = most_windows(self.tokenizer, texts)
        lengths = {"batch": 1 if control else len(texts), "tokens": TEXT_TOKENS * count}  # as `Denoiser` calls them
        for name in names:
            self._ahead[name] = self._loader.submit(self._prepared, name, lengths)

    def _each_step(self, settings: Settings, people: int, control: bool) -> tuple[str, ...]:
        """The graphs of a step; raises BundleError where they are not to be had."""
        return self.machine.denoiser(self.bundle, people > 1 or control or settings.enhancement != 0)

    def _prepared(self, name: str, lengths: dict[str, int]) -> Graph:
        """A graph of each step, loaded for such lengths; of no other state of the pipeline, whose thread goes on."""
        graph = self.machine.load(self.bundle, name)
        graph.prepare({spec.name: tuple(lengths.get(n, 1) if isinstance(n, str) else n for n in spec.shape)
                       for spec in graph.inputs})
        return graph

    def landmarks(self, head: HeadCode) -> UInt8[np.ndarray, "h w 3"]:
        """The head's 68 landmarks as the official pose map draws them: the picture for a ControlNet of faces."""
        return landmark_picture(self.head_model, head, self.bundle.config.height, self.bundle.config.width)

    def decode(self, latent: Float32[np.ndarray, "1 c h w"], decoder: str) -> UInt8[np.ndarray, "H W 3"]:
        """A scaled latent as pixels, truncated as the official tool does."""
        graph = self.graph(decoder)
        tile = self.bundle.config.tile_shape if decoder == DECODERS[KL] else latent.shape[-2:]
        (sample,) = in_tiles(lambda part: graph({"latent_sample": part})["sample"], latent, *tile)
        return np.clip(sample * 127.5 + 127.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)

    def graph(self, name: str) -> Graph:
        """A graph of the bundle, loaded once, or again where memory is short and another was used since."""
        if name not in self._graphs:
            if self.machine.memory == "stage" and name not in TOGETHER:
                self._forget()
            if self.machine.memory == "steps" and name in EACH_STEP:
                self._forget(but=EACH_STEP)
            ahead = self._ahead.pop(name, None)
            self._graphs[name] = ahead.result() if ahead else self.machine.load(self.bundle, name)
        return self._graphs[name]

    def _forget(self, but: Collection[str] = ()) -> None:
        """Let go of graphs, those that measure photos included."""
        self._graphs = {name: graph for name, graph in self._graphs.items() if name in but}
        for stage in ("see", "heads"):
            self.__dict__.pop(stage, None)
        give_back()

    def _encode(self, name: str, arrays: Arrays) -> Arrays:
        """What an encoder makes of these arrays, which it may have been given before."""
        key = name, *map(array_sha256, arrays.values())
        if key not in self._encoded:
            self._encoded[key] = self.graph(name)(arrays)
            for oldest in [*self._encoded][:-REMEMBERED]:
                del self._encoded[oldest]
        return dict(self._encoded[key])

    def preview(self, latent: Float32[np.ndarray, "1 c h w"]) -> UInt8[np.ndarray, "H W 3"]:
        """A cheap, coarse picture of a clean latent, at full size."""
        config = self.bundle.config
        return resize(self.decode(latent, "preview_decoder"), config.height, config.width, "bicubic")

    def _walk(self, latent: Float32[np.ndarray, "1 c h w"], steps: Sequence[SamplerStep], conditions: Conditions,
              known: Known | None, settings: Settings, recipe: dict[str, Any], canvas: Canvas | None) -> Iterator[Step]:
        """Denoise from this latent on."""
        def picture(latent: Float32[np.ndarray, "1 c h w"]) -> UInt8[np.ndarray, "_ _ 3"]:
            pixels = self.decode(latent, decoder_of(settings))
            return canvas.finished(pixels) if canvas else pixels

        denoiser = self._denoiser(conditions)
        # the official generator draws at every step; a counter-based one can leave out the draws nobody uses
        walk = sample(lambda latent, timestep: denoiser.eps(latent, timestep, conditions), latent, steps,
                      lambda index: cuda_normal(settings.seed, latent.shape, offset=1 + index),
                      known.kept if known else None)
        for index, (at, clean) in enumerate(walk):
            yield Step(index, len(steps), steps[index].timestep, clean, at, recipe, self.preview, picture)

    def _denoiser(self, conditions: Conditions) -> Denoiser:
        return Denoiser(self.graph, self.machine.denoiser(self.bundle, conditions.split) == FUSED)

    def _warn_of_sampler(self, settings: Settings) -> None:
        """A model that was distilled for one sampler is asked for another, or the other way about."""
        made_for = self.bundle.schedule.kind
        if settings.schedule != made_for and {settings.schedule, made_for} & {*DISTILLED}:
            warnings.warn(f"schedule {settings.schedule} is asked for, but the bundle's model was made for {made_for}: "
                          "portraits will suffer", stacklevel=2)

    def _conditions(self, people: Sequence[Person], settings: Settings,
                    control: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"] | None) -> Conditions:
        """What the denoiser reads at every step and no step changes."""
        hints = []
        if control is not None:
            hints.append(self.graph("control_encoder")({"image": self._control_image(control)})["hint"])
        conditions = Conditions(
            self._text_tokens(settings), [self._person(who) for who in people], scales_of(settings.strength),
            settings.guidance or 0.0, settings.identity_guidance or 0.0, settings.tau, settings.enhancement, hints,
            scales_of(settings.control_strength, "control_strength"))
        self._check_tokens(conditions)
        return conditions

    def _check_tokens(self, conditions: Conditions) -> None:
        """Raise BadInput for prompts longer than what the UNet of this portrait reads, such as Core ML's."""
        given = conditions.text.shape[1]
        if given == TEXT_TOKENS:  # which every UNet reads: none need be loaded to ask
            return
        unet = self.graph(self.machine.denoiser(self.bundle, conditions.split)[-1])
        most = next(spec.shape[1] for spec in unet.inputs if spec.name == "text_tokens")
        if isinstance(most, int) and given > most:
            raise BadInput(f"the prompts take {given} tokens, this bundle's UNet reads {most} on backend "
                           f"{self.machine.backend}; shorten them, or choose another backend")

    def _person(self, who: Person) -> Arrays:
        """One person as CapFace reads it."""
        if who.mask is not None and who.mask.shape != (self.bundle.config.height, self.bundle.config.width):
            raise BadInput(f"a person's mask has {who.mask.shape[1]}x{who.mask.shape[0]} px, expected "
                           f"{self.bundle.config.width}x{self.bundle.config.height}; scale it to the bundle's frame")
        subject, head = who.subject, who.head or who.subject.head
        tokens = self._encode("image_encoder", {"pixel_values": subject.face_crop[None]})["last_hidden_state"]
        person = self._encode("hint_encoder", {"maps": self.maps(head)[None], "image_tokens": tokens,
                                               "identity": subject.identity[None]})
        del person["mask"]
        return person if who.mask is None else within(person, who.mask)

    def _control_image(self, picture: UInt8[np.ndarray, "h w 3"] | Float32[np.ndarray, "h w 3"]
                       ) -> Float32[np.ndarray, "1 3 H W"]:
        height, width = self.bundle.config.height, self.bundle.config.width
        if picture.dtype == np.uint8:
            picture = resize(picture, height, width, "bilinear").astype(np.float32) / 255
        if picture.shape[:2] != (height, width):
            raise BadInput(f"the control picture has {picture.shape[1]}x{picture.shape[0]} px, expected "
                           f"{width}x{height}; scale it, or pass bytes")
        return np.ascontiguousarray(picture.transpose(2, 0, 1)[None])

    def _known(self, canvas: Canvas, noise: Float32[np.ndarray, "1 c h w"]) -> Known:
        config = self.bundle.config
        sample = canvas.frame(config.height, config.width).astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        mean = self.graph("vae_encoder")({"sample": sample})["latent_parameters"][:, :config.vae.latent_channels]
        return Known(mean, noise, drawn_cells(canvas.mask, *config.latent_shape[1:]))

    def _text_tokens(self, settings: Settings) -> Float32[np.ndarray, "b n c"]:
        """The tokens of prompt and, with guidance, negative prompt."""
        return text_tokens(self.tokenizer, _texts(settings),
                           lambda ids: self._encode("text_encoder", {"input_ids": ids})["last_hidden_state"])

    def _recipe(self, people: Sequence[Person], settings: Settings, canvas: Canvas | None,
                control: np.ndarray | None) -> dict[str, Any]:
        """All that makes the picture again, but the photos themselves: no path, since the picture may be shared."""
        (head_digest,) = sha256_of([self.head_file]).values()
        others: dict[str, Any] = {} if control is None else {"control_sha256": array_sha256(control)}
        if canvas is not None:
            mask = None if canvas.mask is None else array_sha256(canvas.mask)
            others["canvas"] = {"photo_sha256": array_sha256(canvas.photo), "mask_sha256": mask}
        return {**dataclasses.asdict(settings), "backend": self.machine.backend,
                "device": self.machine.device, "precision": self.machine.precision,
                "people": [_told(who) for who in people],
                **others, "head_sha256": head_digest,
                "bundle": self.bundle.manifest.name, "bundle_sha256": self.bundle.digest,
                "made_with": f"caphuman-edge {version('caphuman-edge')}"}


def _walked(steps: Sequence[SamplerStep], denoise: float) -> Sequence[SamplerStep]:
    """The last steps, as large a share of them as is drawn anew; one at least."""
    return steps[-max(1, round(denoise * len(steps))):]


def _texts(settings: Settings) -> list[str]:
    """The prompt; with guidance, the negative prompt before it."""
    return [settings.prompt] if settings.guidance == 1 else [settings.negative, settings.prompt]


def _told(who: Person) -> dict[str, Any]:
    mask = {} if who.mask is None else {"mask_sha256": array_sha256(who.mask)}
    return {**who.subject.source, "head": (who.head or who.subject.head).numbers(), **mask}
