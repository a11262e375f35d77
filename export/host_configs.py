"""config.json of the graphs that other hosts know, in transformers' and diffusers' words: what optimum looks for."""
import json
from pathlib import Path
from typing import Any

from caphuman_edge.ref.tiny_decoder import BLOCKS
from caphuman_edge.runtime.contract import TEXT_TOKENS, Config

FILE = "config.json"
BOS, EOS = 49406, 49407  # of CLIP's vocabulary; the latter also pads


def write_config(graph: str, config: Config, folder: Path) -> None:
    """Write it where the graph is one of those; the others have no name elsewhere."""
    described = {"text_encoder": _text, "image_encoder": _vision, "vae_encoder": _autoencoder,
                 "vae_decoder": _autoencoder, "tiny_decoder": _tiny}
    if graph in described:
        (folder / FILE).write_text(json.dumps(described[graph](config), indent=1) + "\n")


def _text(config: Config) -> dict[str, Any]:
    text = config.text
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
            "hidden_size": text.width, "intermediate_size": 4 * text.width, "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "vocab_size": text.vocabulary, "max_position_embeddings": TEXT_TOKENS,
            "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}


def _vision(config: Config) -> dict[str, Any]:
    vision = config.vision
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
            "hidden_size": vision.width, "intermediate_size": 4 * vision.width, "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads, "image_size": vision.image_size, "patch_size": vision.patch_size}


def _autoencoder(config: Config) -> dict[str, Any]:
    """Its scaling factor is 1: the graphs give and take latents as the denoiser has them, and scale them inside."""
    vae = config.vae
    levels = len(vae.channel_mult)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", "in_channels": 3, "out_channels": 3,
            "latent_channels": vae.latent_channels, "layers_per_block": vae.num_res_blocks,
            "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
            "norm_num_groups": vae.norm_groups, "sample_size": config.height, "scaling_factor": 1.0}


def _tiny(config: Config) -> dict[str, Any]:
    """That of the whole autoencoder: diffusers describes no decoder alone."""
    vae, levels = config.vae, len(config.vae.channel_mult)
    return {"_class_name": "AutoencoderTiny", "act_fn": "relu", "in_channels": 3, "out_channels": 3,
            "latent_channels": vae.latent_channels, "block_out_channels": [config.tiny_channels] * levels,
            "encoder_block_out_channels": [config.tiny_channels] * levels,
            "decoder_block_out_channels": [config.tiny_channels] * levels,
            "num_encoder_blocks": [1] + [BLOCKS] * (levels - 1), "num_decoder_blocks": [BLOCKS] * (levels - 1) + [1],
            "upsampling_scaling_factor": 2, "sample_size": config.height, "scaling_factor": 1.0}
