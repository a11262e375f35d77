"""The fast decoder: TAESD's layers under TAESD's names, checked against diffusers' own, and its files told apart."""
import dataclasses

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from caphuman_edge.export.random_weights import write_checkpoints
from caphuman_edge.export.weights import load_tiny_decoder
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.ref.tiny_decoder import TinyDecoder, taesd_names
from caphuman_edge.runtime.contract import FULL, TINY
from caphuman_edge.runtime.errors import CheckpointError

SMALL = dataclasses.replace(FULL, tiny_channels=8)


def autoencoder(width=8, latent_channels=4):
    """diffusers' own, of random weights that keep variance."""
    torch.manual_seed(1)
    sizes = {f"{side}_block_out_channels": (width,) * 4 for side in ("encoder", "decoder")}
    model = AutoencoderTiny(latent_channels=latent_channels, **sizes).eval().requires_grad_(False)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
    return model


def taesd_file(path, model):
    """Its decoder as TAESD's authors publish theirs: pickled, the bound counted as layer 0."""
    layers = {f"{int(name.split('.')[1]) + 1}.{name.split('.', 2)[2]}": tensor
              for name, tensor in model.decoder.state_dict().items()}
    torch.save(layers, path)
    return path


def diffusers_file(path, model, keep=("decoder.", "encoder.")):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(keep)}
    save_file(weights, path)
    return path


def refused(path, config=SMALL):
    with pytest.raises(CheckpointError) as caught:
        load_tiny_decoder(path, config)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


def test_the_full_size_has_the_published_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in TinyDecoder(FULL).state_dict().items()}
    blocks = [3, 4, 5, 8, 9, 10, 13, 14, 15, 18]
    expected = {"1.weight": (64, 4, 3, 3), "1.bias": (64,), "19.weight": (3, 64, 3, 3), "19.bias": (3,)}
    expected |= {f"{layer}.weight": (64, 64, 3, 3) for layer in (7, 12, 17)}
    for block in (f"{layer}.conv.{part}" for layer in blocks for part in (0, 2, 4)):
        expected |= {f"{block}.weight": (64, 64, 3, 3), f"{block}.bias": (64,)}
    assert shapes == expected


@pytest.mark.parametrize("write", [taesd_file, diffusers_file])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_it_computes_what_diffusers_computes(tmp_path, write, size):
    """From either kind of file, for latents far outside of its bound, too."""
    model = autoencoder()
    decoder, origin = load_tiny_decoder(write(tmp_path / "taesd_decoder.safetensors" if write is diffusers_file
                                              else tmp_path / "taesd_decoder.pth", model), SMALL)
    latent = 4 * torch.randn(2, 4, *size)
    wanted = model.decode(latent).sample
    assert wanted.std() > 0.3
    torch.testing.assert_close(decoder(latent), wanted, atol=1e-5, rtol=1e-5)
    assert (origin.part, origin.tensors, origin.dtypes) == ("tiny_decoder", 67, ("float32",))


def test_weights_in_halves_are_read_as_float32(tmp_path):
    model = autoencoder()
    decoder, origin = load_tiny_decoder(taesd_file(tmp_path / "taesd_decoder.pth", model.half()), SMALL)
    assert decoder[1].weight.dtype == torch.float32 and origin.dtypes == ("float16",)
    assert torch.equal(decoder[1].weight, model.decoder.layers[0].weight.float())


def test_files_that_do_not_serve_are_told_apart_in_one_line(tmp_path):
    model = autoencoder()
    encoder = diffusers_file(tmp_path / "encoder.safetensors", model, keep="encoder.")
    assert "seems to be the encoder of a tiny autoencoder (TAESD), expected the decoder of TAESD" in refused(encoder)
    flux = taesd_file(tmp_path / "taef1_decoder.pth", autoencoder(latent_channels=16))
    assert "1 mis-shaped (1.weight is (8, 16, 3, 3) not (8, 4, 3, 3))" in refused(flux)
    wide = taesd_file(tmp_path / "wide.pth", autoencoder(width=16))
    assert "mis-shaped" in refused(wide)
    model.decoder.layers[0].weight[0] = torch.nan
    assert "holds NaN or infinity, first in 1.weight" in refused(taesd_file(tmp_path / "damaged.pth", model))
    vae = tmp_path / "vae.safetensors"
    save_file({"decoder.conv_in.weight": torch.ones(4, 4, 3, 3)}, vae)
    assert "seems to be an autoencoder (VAE), expected the decoder of TAESD, for Stable Diffusion 1.x" in refused(vae)
    assert "does not exist" in refused(tmp_path / "absent.pth")


def test_names_that_are_no_diffusers_names_stay(tmp_path):
    weights = {"1.weight": torch.ones(1), "18.conv.0.bias": torch.ones(1)}
    assert taesd_names(weights) == weights


def test_random_weights_draw_a_lively_picture(tmp_path):
    config = dataclasses.replace(TINY, height=64, width=64, tiny_channels=16)
    path = write_checkpoints(tmp_path, config, seed=3)["tiny_decoder"]
    decoder = TinyDecoder(config)
    load_strictly(decoder, load_file(path), str(path))
    torch.manual_seed(0)
    with torch.no_grad():
        pictures = [decoder(torch.randn(1, 4, 8, 8)) for _ in range(2)]
    assert pictures[0].shape == (1, 3, 64, 64) and 0.2 < pictures[0].std() < 5
    assert (pictures[0] - pictures[1]).std() > 0.1
