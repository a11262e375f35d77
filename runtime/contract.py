"""The contract: sizes of a CapHuman model, and every graph's tensors as they follow from them.

Export writes these names, shapes and dtypes; backends verify them; quantisation reads them.
The tiny golden nets, the embedded miniature and full SD-1.5 are three values of one `Config`.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB in 0..1: the image encoder's input is normalised so
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
GATE = "gate_"  # how the names of gates begin; the rest is the level
RESIDUALS = 13  # CapFace residuals: 12 input blocks and the middle block
PERCEPTION_GRAPHS = ("face_detector", "face_landmarks", "face_blendshapes", "id_encoder")
# What a bundle built from official checkpoints measures photos with besides: DECA, BiSeNet and MTCNN.
OFFICIAL_GRAPHS = ("head_encoder", "parser", "mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet")
HELD_OUT_SEEDS = 300  # pictures of seeds below this are for scoring, never for training
TEXT_TOKENS = 77  # CLIP's window; longer prompts use a multiple of it


@dataclass(frozen=True)
class UNetConfig:
    """Sizes shared by the UNet and by CapFace, which is a copy of its encoder."""

    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)  # level k works at latent size / 2**k
    num_heads: int = 8
    norm_groups: int = 32
    context_width: int = 768
    hint_channels: int = 9  # normal, albedo, rendered
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    key_pooling: int = 1  # edge of the squares whose mean is one key and value of the finest self-attention; 1 is exact
    prediction: str = "eps"  # what the last layer gives; of "v" the UNet makes eps, so graphs and samplers see eps


@dataclass(frozen=True)
class TextConfig:
    """CLIP text encoder; its width must equal the UNet's context width."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 49408


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision encoder, or the miniature's patch encoder of the same form."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    image_size: int = 224  # px
    patch_size: int = 14  # px

    @property
    def tokens(self) -> int:
        """Patch tokens plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class VaeConfig:
    """KL autoencoder of Latent Diffusion, eight pixels to a latent cell."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    latent_channels: int = 4
    latent_scale: float = 0.18215  # scaled latent = latent_scale * mean

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one edge."""
        return int(2 ** (len(self.channel_mult) - 1))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "VaeConfig":
        """Rebuild the sizes that `dataclasses.asdict` made."""
        return cls(**_tuples(data))


@dataclass(frozen=True)
class Config:
    """One CapHuman model. Defaults are the official full size."""

    height: int = 512  # px
    width: int = 512  # px
    identity_width: int = 512  # length of the face-recognition vector
    identity_size: int = 160  # px, edge of the face that it is made from: 160 is FaceNet's, 112 SFace's
    tiny_channels: int = 64  # width of the fast decoder: 64 is TAESD's
    decoder_tile: int = 0  # px, edge of the tiles that vae_decoder makes one at a time; 0 makes all at once, exactly
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    vae: VaeConfig = VaeConfig()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of one latent."""
        return self.vae.latent_channels, self.height // self.vae.downscale, self.width // self.vae.downscale

    @property
    def tile_shape(self) -> tuple[int, int]:
        """(rows, columns) of latent cells that `vae_decoder` takes at once."""
        rows, columns = self.latent_shape[1:]
        edge = self.decoder_tile // self.vae.downscale
        return (min(edge, rows), min(edge, columns)) if edge else (rows, columns)

    @property
    def face_tokens(self) -> int:
        """Tokens that CapFace reads: image tokens, then one identity token."""
        return self.vision.tokens + 1

    def to_json(self) -> dict[str, Any]:
        """A dict that `from_json` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Config":
        """Rebuild a config; unknown keys raise TypeError, missing ones take the full size's values."""
        parts = {"unet": UNetConfig, "text": TextConfig, "vision": VisionConfig, "vae": VaeConfig}
        fields = {k: parts[k](**_tuples(v)) if k in parts else v for k, v in data.items()}
        return cls(**fields)


FULL = Config()
TINY = Config(  # the golden vectors' nets
    height=128, width=128,
    unet=UNetConfig(model_channels=32, context_width=64),
    text=TextConfig(width=64, layers=3, heads=4),
    vision=VisionConfig(width=64, layers=3, heads=4),
    vae=VaeConfig(channels=32),
)
NANO = Config(  # the embedded miniature
    height=256, width=256, identity_width=128, identity_size=112, tiny_channels=32,
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2, 3, 4), attention_levels=(1, 2), num_heads=2,
                    norm_groups=8, context_width=64, hint_widths=(8, 16, 32, 64), prediction="v"),
    text=TextConfig(width=64, layers=2, heads=4),
    vision=VisionConfig(width=128, layers=3, heads=4, image_size=96, patch_size=12),
    vae=VaeConfig(channels=24, num_res_blocks=1, norm_groups=8),
)


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output. A string in the shape is a symbolic length."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class GraphSpec:
    """A graph's name (also its folder in the bundle), inputs and outputs in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graphs(config: Config) -> dict[str, GraphSpec]:
    """Every graph that a bundle of this size may hold, by name."""
    specs = (*_perception_graphs(config), *_encoder_graphs(config), *_denoiser_graphs(config), *_vae_graphs(config))
    return {spec.name: spec for spec in specs}


def residual_shapes(config: Config) -> list[tuple[int, int, int]]:
    """(channels, rows, columns) of the 13 CapFace residuals, in input-block order, middle last."""
    unet, (_, rows, columns) = config.unet, config.latent_shape
    mults = [1]
    for level, mult in enumerate(unet.channel_mult):
        mults += [mult] * (unet.num_res_blocks + (level < len(unet.channel_mult) - 1))
    return [(mult * unet.model_channels, rows >> level, columns >> level)
            for mult, level in zip([*mults, mults[-1]], residual_levels(unet), strict=True)]


def residual_levels(unet: UNetConfig) -> list[int]:
    """The level of each residual; level k works at latent size / 2**k, and `gate_k` gates it."""
    last = len(unet.channel_mult) - 1
    levels = [0]
    for level in range(last + 1):
        levels += [level] * unet.num_res_blocks + [level + 1] * (level < last)
    return [*levels, last]


def _perception_graphs(config: Config) -> list[GraphSpec]:
    """Images are RGB: the detector's -1..1, the landmarks' 0..1, `face` 0..255. Scores and presence are probabilities.

    Points are pixels: the detector's relative to its anchors, the landmarks' in their crop, z in the same scale.
    The official networks' images are 0..1, MTCNN's (value - 127.5) / 128; `parameters` are DECA's 236: shape 100,
    texture 50, expression 50, pose 6, camera 3, light 27. MTCNN's probabilities are softmax, face last.
    """
    return [
        GraphSpec("face_detector", (TensorSpec("image", (1, 128, 128, 3)),),
                  (TensorSpec("regressors", (1, 896, 16)), TensorSpec("scores", (1, 896, 1)))),
        GraphSpec("face_landmarks", (TensorSpec("image", (1, 256, 256, 3)),),
                  (TensorSpec("landmarks", (1, 478, 3)), TensorSpec("presence", (1, 1)))),
        GraphSpec("face_blendshapes", (TensorSpec("landmarks", (1, 146, 2)),), (TensorSpec("scores", (52,)),)),
        GraphSpec("id_encoder", (TensorSpec("face", (1, 3, config.identity_size, config.identity_size)),),
                  (TensorSpec("identity", (1, config.identity_width)),)),
        *_official_graphs(),
    ]


def _official_graphs() -> list[GraphSpec]:
    box = TensorSpec("regression", ("batch", 4)), TensorSpec("probability", ("batch", 2))
    return [
        GraphSpec("head_encoder", (TensorSpec("image", (1, 3, 224, 224)),), (TensorSpec("parameters", (1, 236)),)),
        GraphSpec("parser", (TensorSpec("image", (1, 3, "height", "width")),),
                  (TensorSpec("logits", (1, 19, "height", "width")),)),
        GraphSpec("mtcnn_pnet", (TensorSpec("image", (1, 3, "height", "width")),),
                  (TensorSpec("regression", (1, 4, "rows", "columns")),
                   TensorSpec("probability", (1, 2, "rows", "columns")))),
        GraphSpec("mtcnn_rnet", (TensorSpec("image", ("batch", 3, 24, 24)),), box),
        GraphSpec("mtcnn_onet", (TensorSpec("image", ("batch", 3, 48, 48)),),
                  (*box, TensorSpec("points", ("batch", 10)))),
    ]


def _encoder_graphs(config: Config) -> list[GraphSpec]:
    vision, text, unet = config.vision, config.text, config.unet
    channels, rows, columns = (unet.model_channels, *config.latent_shape[1:])
    image_tokens = TensorSpec("image_tokens", (1, vision.tokens, vision.width))
    return [
        GraphSpec("image_encoder", (TensorSpec("pixel_values", (1, 3, vision.image_size, vision.image_size)),),
                  (TensorSpec("last_hidden_state", image_tokens.shape),)),
        GraphSpec("text_encoder", (TensorSpec("input_ids", ("batch", TEXT_TOKENS), "int64"),),
                  (TensorSpec("last_hidden_state", ("batch", TEXT_TOKENS, text.width)),)),
        GraphSpec("hint_encoder",
                  (TensorSpec("maps", (1, unet.hint_channels, config.height, config.width)), image_tokens,
                   TensorSpec("identity", (1, config.identity_width))),
                  (TensorSpec("hint", (1, channels, rows, columns)), TensorSpec("mask", (1, 1, rows, columns)),
                   *_gates(config), _face_tokens(config))),
    ]


def _denoiser_graphs(config: Config) -> list[GraphSpec]:
    """The fused denoiser, its split form (capface, unet), and a second ControlNet with the encoder of its picture.

    `residual_*` are raw outputs; who calls the split form scales, gates and sums them. A second ControlNet reads the
    text, so its residuals differ from text to text. Its picture is RGB, 0..1.
    """
    latent = TensorSpec("latent", (1, *config.latent_shape))
    timestep = TensorSpec("timestep", (1,))  # 0..999, float so that every backend takes it
    text = TensorSpec("text_tokens", ("batch", "tokens", config.unet.context_width))
    hint = TensorSpec("hint", (1, config.unet.model_channels, *config.latent_shape[1:]))
    eps = TensorSpec("eps", ("batch", *config.latent_shape))
    shapes = residual_shapes(config)
    residuals = tuple(TensorSpec(f"residual_{i:02}", (1, *shape)) for i, shape in enumerate(shapes))
    by_text = tuple(TensorSpec(f"residual_{i:02}", ("batch", *shape)) for i, shape in enumerate(shapes))
    picture = TensorSpec("image", (1, 3, config.height, config.width))
    return [
        GraphSpec("denoiser", (latent, timestep, text, _face_tokens(config), hint, *_gates(config),
                               TensorSpec("scales", (RESIDUALS,))), (eps,)),
        GraphSpec("capface", (latent, timestep, _face_tokens(config), hint), residuals),
        GraphSpec("unet", (latent, timestep, text, *residuals), (eps,)),
        GraphSpec("control_encoder", (picture,), (hint,)),
        GraphSpec("controlnet", (latent, timestep, text, hint), by_text),
    ]


def _vae_graphs(config: Config) -> list[GraphSpec]:
    """Pictures are RGB, about -1..1. Latents are scaled: `latent_parameters` are the mean and log variance of one."""
    latent = TensorSpec("latent_sample", (1, *config.latent_shape))
    channels, rows, columns = config.latent_shape
    picture = TensorSpec("sample", (1, 3, config.height, config.width))
    return [
        GraphSpec("vae_encoder", (picture,), (TensorSpec("latent_parameters", (1, 2 * channels, rows, columns)),)),
        GraphSpec("vae_decoder", (TensorSpec("latent_sample", (1, channels, *config.tile_shape)),),
                  (TensorSpec("sample", (1, 3, *(config.vae.downscale * cells for cells in config.tile_shape))),)),
        GraphSpec("tiny_decoder", (latent,), (picture,)),  # the same in a fraction of the time, and a little worse
        GraphSpec("preview_decoder", (latent,), (TensorSpec("sample", (1, 3, rows, columns)),)),
    ]


def _gates(config: Config) -> tuple[TensorSpec, ...]:
    """0/1 gates, one a level: `gate_k` at latent size / 2**k."""
    rows, columns = config.latent_shape[1:]
    levels = range(len(config.unet.channel_mult))
    return tuple(TensorSpec(f"{GATE}{k}", (1, 1, rows >> k, columns >> k)) for k in levels)


def _face_tokens(config: Config) -> TensorSpec:
    return TensorSpec("face_tokens", (1, config.face_tokens, config.unet.context_width))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
