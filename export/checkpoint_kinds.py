"""What a file of weights is, told from its tensors' names and shapes, so that a wrong file gets an error that says so.

A user passes a file in a role, one of EXPECTED; `refuse_other` accepts the kinds that serve there and tells of any
other what it seems to be and where it belongs.
"""
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from caphuman_edge.runtime.contract import Config
from caphuman_edge.runtime.errors import CheckpointError

CAPHUMAN, STABLE_DIFFUSION, VAE, CONTROLNET, LORA = "caphuman", "stable_diffusion", "vae", "controlnet", "lora"
TINY_DECODER = "tiny_decoder"
SDXL, DIFFUSERS_CONTROLNET, SDXL_CONTROLNET = "sdxl", "diffusers_controlnet", "sdxl_controlnet"
WITH_BACKBONE = "sd_with_controlnet"
EXPECTED = {  # role: kinds that serve, and how they are called
    "caphuman": ({CAPHUMAN}, "CapHuman's own caphuman.ckpt"),
    "backbone": ({STABLE_DIFFUSION}, "a Stable Diffusion 1.x checkpoint or diffusers folder"),
    "vae": ({VAE}, "the KL autoencoder of Stable Diffusion 1.x"),
    "controlnet": ({CONTROLNET, DIFFUSERS_CONTROLNET, WITH_BACKBONE}, "a ControlNet for Stable Diffusion 1.5"),
    "lora": ({LORA}, "a LoRA for Stable Diffusion 1.x"),
    TINY_DECODER: ({TINY_DECODER}, "the decoder of TAESD, for Stable Diffusion 1.x"),
}
DESCRIPTIONS = {  # kind: what it seems to be, and what to do
    CAPHUMAN: ("a CapHuman checkpoint", "pass it as the caphuman checkpoint"),
    STABLE_DIFFUSION: ("a Stable Diffusion checkpoint", "pass it as the backbone"),
    VAE: ("an autoencoder (VAE)", "pass it as the VAE"),
    CONTROLNET: ("a ControlNet", "pass it as the ControlNet"),
    DIFFUSERS_CONTROLNET: ("a ControlNet in diffusers' layout", "pass it as the ControlNet"),
    WITH_BACKBONE: ("a Stable Diffusion checkpoint with a ControlNet in it", "pass it as the ControlNet"),
    SDXL_CONTROLNET: ("a ControlNet for SDXL", "CapHuman works with Stable Diffusion 1.x; pass a ControlNet for that"),
    "control_lora": ("a Control-LoRA, which holds a ControlNet as changes of a UNet", "pass a whole ControlNet"),
    "control_difference": ("a ControlNet stored as its difference from a UNet", "pass a whole ControlNet"),
    "control_lllite": ("a ControlNet-LLLite", "pass a whole ControlNet"),
    "t2i_adapter": ("a T2I adapter", "these are not supported; pass a ControlNet"),
    LORA: ("a LoRA", "pass it as a LoRA"),
    "diffusers_unet": ("a UNet of a diffusers folder", "pass the folder that holds unet/, vae/ and text_encoder/"),
    "bare_unet": ("a UNet alone, without its model.diffusion_model prefix", "pass the whole checkpoint"),
    "open_clip": ("a Stable Diffusion 2.x checkpoint", "CapHuman works with 1.x; pass one of those"),
    SDXL: ("an SDXL checkpoint", "CapHuman works with Stable Diffusion 1.x; pass one of those"),
    "transformer": ("a transformer model such as Flux or SD 3", "CapHuman works with Stable Diffusion 1.x"),
    "text_encoder": ("a CLIP text encoder alone", "pass the whole checkpoint"),
    "vision_encoder": ("a CLIP image encoder alone", "pass the whole checkpoint"),
    "embedding": ("a textual-inversion embedding", "these are not supported; leave it out"),
    TINY_DECODER: ("a tiny autoencoder (TAESD)", "pass it as the tiny decoder"),
    "tiny_encoder": ("the encoder of a tiny autoencoder (TAESD)", "pass its decoder as the tiny decoder"),
    "unknown": ("no model known here", "check that it is the right file"),
}
OTHER_INPUTS = {9: "an inpainting model", 8: "an image-editing model (InstructPix2Pix)", 5: "a depth-guided model"}
OTHER_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
FIRST_CONVOLUTIONS = ("model.diffusion_model.input_blocks.0.0.weight", "control_model.input_blocks.0.0.weight",
                      "input_blocks.0.0.weight", "conv_in.weight")
LORA_MARKS = ("lora_", ".lora.", ".lora_A", ".lora_B", "_lora.", "hada_", "lokr_", "dora_scale")
# What tells a kind: the first line of which a name starts with one of its beginnings decides.
BEGINNINGS = (
    (CAPHUMAN, ("id_linear.", "img_linear.", "control_model.mask_predict.")),
    ("control_lora", ("lora_controlnet",)),
    ("control_lllite", ("lllite_",)),
    ("t2i_adapter", ("adapter.body.", "adapter.conv_in.", "body.0.")),
    ("control_difference", ("difference",)),
    (SDXL, ("conditioner.embedders.", "model.diffusion_model.label_emb.", "add_embedding.",
            "control_model.label_emb.", "label_emb.")),
    ("open_clip", ("cond_stage_model.model.",)),
    (STABLE_DIFFUSION, ("model.diffusion_model.input_blocks.",)),
    ("transformer", ("double_blocks.", "transformer_blocks.", "model.diffusion_model.double_blocks.",
                     "model.diffusion_model.joint_blocks.", "joint_blocks.")),
    (CONTROLNET, ("control_model.input_hint_block.", "input_hint_block.")),
    (DIFFUSERS_CONTROLNET, ("controlnet_cond_embedding.",)),
    (VAE, ("first_stage_model.decoder.conv_in.", "first_stage_model.encoder.conv_in.", "decoder.conv_in.",
           "encoder.conv_in.")),
    ("diffusers_unet", ("time_embedding.linear_1.",)),
    ("bare_unet", ("input_blocks.0.0.", "diffusion_model.input_blocks.")),
    ("vision_encoder", ("vision_model.embeddings.",)),
    ("text_encoder", ("text_model.embeddings.", "embeddings.token_embedding.", "cond_stage_model.")),
    ("embedding", ("emb_params", "string_to_param", "<")),
    (TINY_DECODER, ("decoder.layers.", "1.weight")),
    ("tiny_encoder", ("encoder.layers.", "0.weight")),
)


def refuse_other(role: str, path: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Raise CheckpointError, saying what the file seems to be, unless its kind and sizes serve in that role."""
    kinds, expected = EXPECTED[role]
    kind = kind_of(tensors)
    if kind not in kinds:
        seems, remedy = DESCRIPTIONS[kind]
        raise CheckpointError(f"{path} seems to be {seems}, expected {expected}; {remedy}")
    if kind == LORA:
        return
    _refuse_other_inputs(path, tensors, config)
    _refuse_other_width(path, tensors, config)


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """What a file seems to be: one of the keys of DESCRIPTIONS."""
    if any(mark in name for name in tensors for mark in LORA_MARKS) and "lora_controlnet" not in tensors:
        return LORA
    found = [kind for kind, beginnings in BEGINNINGS if any(name.startswith(beginnings) for name in tensors)]
    if STABLE_DIFFUSION in found and CONTROLNET in found and CAPHUMAN not in found:
        return WITH_BACKBONE
    if SDXL in found and {CONTROLNET, DIFFUSERS_CONTROLNET} & set(found):
        return SDXL_CONTROLNET
    return found[0] if found else "unknown"


def context_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Width of the tokens that a network's cross-attention reads; None where it has none."""
    widths = (tensor.shape[1] for name, tensor in tensors.items()
              if name.endswith("attn2.to_k.weight") and tensor.ndim == 2)
    return next(widths, None)


def family_of(width: int) -> str:
    """Which models read tokens of that width."""
    return OTHER_WIDTHS.get(width, "another model")


def _refuse_other_width(path: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    width, wanted = context_width(tensors), config.unet.context_width
    if width not in (None, wanted):
        raise CheckpointError(f"{path} seems to be for {family_of(width)}: its attention reads tokens {width} wide, "
                              f"expected {wanted}; pass a model of the same family as caphuman.ckpt")


def _refuse_other_inputs(path: Path, tensors: Mapping[str, Tensor], config: Config) -> None:
    wanted = config.vae.latent_channels
    for name in FIRST_CONVOLUTIONS:
        channels = tensors[name].shape[1] if name in tensors and tensors[name].ndim == 4 else wanted
        if channels != wanted:
            what = OTHER_INPUTS.get(channels, "another model")
            raise CheckpointError(f"{path} seems to be {what}: its UNet reads {channels} channels, expected {wanted}; "
                                  "pass a text-to-image model")
