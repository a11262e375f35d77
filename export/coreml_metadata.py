"""What a Core ML package says about itself: author, licence, version, and what every tensor means and ranges over."""
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from caphuman_edge.runtime.contract import GraphSpec, TensorSpec

AUTHOR = "The CapHuman Edge authors"
GRAPHS = {
    "text_encoder": "Prompt tokens to text features; once a prompt.",
    "image_encoder": "The face on white to image tokens; once a photo.",
    "hint_encoder": "Head maps, image tokens and identity to hint, mask, gates and face tokens; once a portrait.",
    "denoiser": "One denoising step: CapFace and UNet in one.",
    "capface": "CapFace: 13 residuals of one person; once a step, for both guidance branches.",
    "unet": "UNet: the noise in the latent; once a step and guidance branch.",
    "unet_chunk1": "First half of the UNet; its outputs are inputs of unet_chunk2.",
    "unet_chunk2": "Second half of the UNet, after unet_chunk1: the noise in the latent.",
    "control_encoder": "The ControlNet's picture to its hint; once a portrait.",
    "controlnet": "ControlNet: 13 residuals; once a step and guidance branch.",
    "vae_encoder": "A picture to the distribution of its latent; once a portrait that begins from one.",
    "vae_decoder": "The last latent, or a tile of it, to the portrait; once a portrait.",
    "tiny_decoder": "The last latent to the portrait, fast and a little worse than vae_decoder does it.",
    "preview_decoder": "A latent to a coarse picture at latent size; once a step, if at all.",
}
TENSORS = {
    "input_ids": "CLIP token ids, 0 to 49407: start 49406, the prompt, end 49407, padded with 49407",
    "pixel_values": "RGB, CLIP-normalised: (value / 255 - mean) / deviation, about -2 to 2.7",
    "last_hidden_state": "Features, one row a token; no fixed range, about -30 to 30",
    "maps": "Head maps, 3 channels each: normals -1 to 1, albedo and rendered 0 to about 1; 0 where no head is",
    "image_tokens": "last_hidden_state of image_encoder",
    "identity": "The face-recognition vector, of length 1",
    "hint": "The encoded maps, or the encoded picture of a ControlNet, to be given to every step",
    "mask": "Probability, 0 to 1, that a latent cell belongs to the face",
    "face_tokens": "Projected image tokens, then one of the identity; zeros while they are held back (tau)",
    "latent": "The noisy latent, about -4 to 4",
    "timestep": "The timestep, 0 to 999, a whole number",
    "text_tokens": "last_hidden_state of text_encoder, for this guidance branch",
    "scales": "Strength of each of the 13 residuals, 0 to 2, 1 as trained",
    "eps": "The predicted noise, about standard normal",
    "hidden": "State between the halves of the UNet",
    "time": "Time features, between the halves of the UNet",
    "latent_sample": "A scaled latent, as the sampler leaves it, about -4 to 4",
    "latent_parameters": "Mean of the scaled latent, about -4 to 4, then its log variance, about -30 to 0",
    "image": "The ControlNet's picture, such as a drawn pose: RGB, 0 to 1",
    "sample": "RGB, about -1 to 1, not clamped",
}
GATE = "0 or 1 for every cell of this level, latent size / 2**level: mask > 0.5"
RESIDUAL_OUT = "Raw residual: multiply by gate and scale, sum over people, give to unet under the same name"
CONTROL_OUT = "Raw residual: multiply by its strength, add to capface's, give to unet under the same name"
RESIDUAL_IN = "Residual, scaled, gated and summed over people; zeros without a face"
SKIP = "State between the halves of the UNet"


def describe(description: Any, spec: GraphSpec, licence: str, stored: str, order: tuple[int, int]) -> None:
    """Fill in a Core ML ModelDescription message. `order` is this package's number, from 1, and how many there are."""
    metadata = description.metadata
    metadata.author, metadata.license = AUTHOR, licence
    metadata.versionString, metadata.shortDescription = version("caphuman-edge"), GRAPHS.get(spec.name, spec.name)
    package, packages = order
    metadata.userDefined.update({"caphuman.graph": spec.name.removesuffix(f"_chunk{package}"),
                                 "caphuman.precision": stored, "caphuman.chunk": f"{package}/{packages}"})
    _describe_tensors(description.input, spec.inputs, RESIDUAL_IN)
    _describe_tensors(description.output, spec.outputs, CONTROL_OUT if spec.name == "controlnet" else RESIDUAL_OUT)


def _describe_tensors(features: Iterable[Any], tensors: tuple[TensorSpec, ...], residual: str) -> None:
    families = {"gate": GATE, "residual": residual, "skip": SKIP}
    names = {tensor.name for tensor in tensors}
    for feature in features:
        assert feature.name in names, f"{feature.name} is not in the contract"
        feature.shortDescription = TENSORS.get(feature.name) or families.get(feature.name.split("_")[0], "")
