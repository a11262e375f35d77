"""Names in diffusers' layout and in the official one: a bijection, proven against both."""
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from caphuman_edge.export.diffusers_names import (
    AUTOENCODER,
    OFFICIAL_PREFIX,
    TEXT_ENCODER,
    UNET,
    official_names,
    to_diffusers,
    to_official,
)
from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.checkpoints import is_leftover, load_strictly
from caphuman_edge.ref.clip import TextEncoder
from caphuman_edge.ref.unet import UNet
from caphuman_edge.runtime.contract import FULL, NANO, TextConfig, UNetConfig, VaeConfig

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
PARTS = (UNET, AUTOENCODER, TEXT_ENCODER)
SMALL = dataclasses.replace(
    NANO, unet=UNetConfig(model_channels=8, channel_mult=(1, 2, 2, 4), attention_levels=(0, 1, 2), num_heads=2,
                          norm_groups=4, context_width=16, hint_widths=(4, 4, 4, 4)),
    text=TextConfig(width=16, layers=2, heads=2, vocabulary=64),
    vae=VaeConfig(channels=8, channel_mult=(1, 2, 2, 4), num_res_blocks=1, norm_groups=4))


def weights_of(part, config):
    network = {UNET: lambda: UNet(config.unet), AUTOENCODER: lambda: Autoencoder(config.vae),
               TEXT_ENCODER: lambda: TextEncoder(config.text)}[part]
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in network().state_dict().items() if not is_leftover(name)}


@pytest.mark.parametrize("part", PARTS)
def test_every_official_name_at_full_size_has_one_diffusers_name(part):
    recorded = json.loads((GOLDEN / "keys_caphuman_full.json").read_text())["keys"]
    prefix = OFFICIAL_PREFIX[part]
    official = {name.removeprefix(prefix) for name in recorded if name.startswith(prefix) and not is_leftover(name)}
    names = official_names(part, FULL)
    assert set(names.values()) == official
    assert len(names) == len(official)  # no two official names share a diffusers name


@pytest.mark.parametrize("part", PARTS)
def test_names_there_and_back_are_the_same_weights(part):
    weights = weights_of(part, SMALL)
    back = to_official(part, to_diffusers(part, weights, SMALL), SMALL)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(("part", "diffusers", "official"), [
    (UNET, "conv_in.weight", "input_blocks.0.0.weight"),
    (UNET, "time_embedding.linear_2.bias", "time_embed.2.bias"),
    (UNET, "down_blocks.1.resnets.0.conv_shortcut.weight", "input_blocks.4.0.skip_connection.weight"),
    (UNET, "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
    (UNET, "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
     "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias"),
    (UNET, "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
    (UNET, "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
    (UNET, "up_blocks.3.attentions.2.proj_out.weight", "output_blocks.11.1.proj_out.weight"),
    (AUTOENCODER, "decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
    (AUTOENCODER, "encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
    (TEXT_ENCODER, "text_model.final_layer_norm.bias", "text_model.final_layer_norm.bias")])
def test_published_names_of_stable_diffusion_1_5(part, diffusers, official):
    assert official_names(part, FULL)[diffusers] == official


def test_attention_of_old_autoencoders_is_understood():
    weights = weights_of(AUTOENCODER, SMALL)
    old = {}
    for name, tensor in to_diffusers(AUTOENCODER, weights, SMALL).items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    back = to_official(AUTOENCODER, old, SMALL)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_an_unknown_name_stays_so_that_it_can_be_told():
    assert to_official(UNET, {"mid_block.extra.weight": torch.ones(1)}, SMALL).keys() == {"mid_block.extra.weight"}


def filled(theirs):
    """A foreign network with weights of its own, none zero, and its state dict."""
    torch.manual_seed(1)
    theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return theirs.state_dict()


def test_a_unet_of_diffusers_computes_the_same_here():
    diffusers = pytest.importorskip("diffusers")
    sizes = SMALL.unet
    levels = len(sizes.channel_mult)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, layers_per_block=sizes.num_res_blocks,
        block_out_channels=[sizes.model_channels * mult for mult in sizes.channel_mult],
        down_block_types=["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        cross_attention_dim=sizes.context_width, attention_head_dim=sizes.num_heads, norm_num_groups=sizes.norm_groups)
    ours = UNet(sizes).eval()
    load_strictly(ours, to_official(UNET, filled(theirs), SMALL), "diffusers")
    latent, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, sizes.context_width)
    with torch.no_grad():
        expected = theirs(latent, torch.tensor([17, 801]), text).sample
        assert torch.allclose(ours(latent, torch.tensor([17, 801]), text), expected, atol=1e-4)
    assert expected.std() > 0.1


def test_an_autoencoder_of_diffusers_computes_the_same_here():
    diffusers = pytest.importorskip("diffusers")
    sizes = SMALL.vae
    levels = len(sizes.channel_mult)
    theirs = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=sizes.num_res_blocks,
        block_out_channels=[sizes.channels * mult for mult in sizes.channel_mult], norm_num_groups=sizes.norm_groups,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    ours = Autoencoder(sizes).eval()
    load_strictly(ours, to_official(AUTOENCODER, filled(theirs), SMALL), "diffusers")
    image, latent = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = theirs.encode(image).latent_dist.mean
        assert torch.allclose(ours.moments(image)[0], expected, atol=1e-4)
        decoded = theirs.decode(latent).sample
        assert torch.allclose(ours.decode(latent * sizes.latent_scale), decoded, atol=1e-4)
    assert expected.std() > 0.01
    assert decoded.std() > 0.01


def test_a_text_encoder_of_transformers_computes_the_same_here():
    transformers = pytest.importorskip("transformers")
    sizes = SMALL.text
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=sizes.width, intermediate_size=4 * sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, vocab_size=sizes.vocabulary, bos_token_id=62, eos_token_id=63))
    ours = TextEncoder(sizes).eval()
    load_strictly(ours, to_official(TEXT_ENCODER, filled(theirs), SMALL), "transformers")
    tokens = torch.randint(0, sizes.vocabulary, (1, 77))
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).last_hidden_state, atol=1e-4)
