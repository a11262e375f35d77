"""Other hosts: the standard graphs of a bundle load through optimum's ONNX Runtime classes as they lie."""
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Options, Sources, build
from caphuman_edge.export.check import coarse_inputs
from caphuman_edge.runtime.bundle import EMBEDDED
from caphuman_edge.runtime.schedule import Schedule

diffusion = pytest.importorskip("optimum.onnxruntime.modeling_diffusion")
STANDARD = ("text_encoder", "image_encoder", "vae_encoder", "vae_decoder", "tiny_decoder")


@pytest.fixture(scope="module")
def folder(micro, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Options, "graphs_in", lambda *_: STANDARD)
        out = tmp_path_factory.mktemp("optimum") / "micro"
        sources = Sources(perception_in(EMBEDDED), "micro", Schedule(), {}, {}, "")
        build(micro.model, micro.preview, sources, out, tiny=micro.tiny)
    return out


def parent():
    """What optimum's parts ask of the pipeline that they belong to."""
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def test_the_text_encoder_is_a_text_encoder_of_optimum(micro, folder):
    session = onnxruntime.InferenceSession(str(folder / "text_encoder/model.onnx"))
    encoder = diffusion.ORTTextEncoder(session, parent(), use_io_binding=False)
    encoder.num_hidden_layers = encoder.config.num_hidden_layers
    ids = torch.from_numpy(coarse_inputs(micro.specs["text_encoder"], seed=1)["input_ids"])
    tokens = encoder(ids).last_hidden_state
    torch.testing.assert_close(tokens, micro.modules["text_encoder"](ids), atol=1e-5, rtol=1e-4)
    assert encoder.config.hidden_size == tokens.shape[-1]


@pytest.mark.parametrize("name", ["vae_decoder", "tiny_decoder"])
def test_a_decoder_is_a_decoder_of_optimum_that_takes_latents_as_they_are(micro, folder, name):
    """diffusers divides a latent by the scaling factor before it calls; here that must change nothing."""
    session = onnxruntime.InferenceSession(str(folder / name / "model.onnx"))
    decoder = diffusion.ORTVaeDecoder(session, parent(), use_io_binding=False)
    latent = torch.from_numpy(coarse_inputs(micro.specs[name], seed=1)["latent_sample"])
    image = decoder(latent / decoder.config.scaling_factor).sample
    torch.testing.assert_close(image, micro.modules[name](latent), atol=1e-4, rtol=1e-4)


def test_the_encoder_is_an_encoder_of_optimum_that_gives_latents_as_the_denoiser_has_them(micro, folder):
    """diffusers multiplies a latent by the scaling factor after the call; here that must change nothing."""
    session = onnxruntime.InferenceSession(str(folder / "vae_encoder/model.onnx"))
    encoder = diffusion.ORTVaeEncoder(session, parent(), use_io_binding=False)
    image = torch.from_numpy(coarse_inputs(micro.specs["vae_encoder"], seed=1)["sample"])
    distribution = encoder(image).latent_dist
    autoencoder = micro.model.first_stage_model
    torch.testing.assert_close(distribution.mode() * encoder.config.scaling_factor, autoencoder.encode(image),
                               atol=1e-5, rtol=1e-4)
    deviation = (autoencoder.moments(image)[1] / 2).exp() * micro.config.vae.latent_scale
    torch.testing.assert_close(distribution.std * encoder.config.scaling_factor, deviation, atol=1e-5, rtol=1e-4)


def test_the_image_encoder_is_a_model_of_optimum(micro, folder):
    from optimum.onnxruntime import ORTModelForCustomTasks

    encoder = ORTModelForCustomTasks.from_pretrained(folder / "image_encoder")
    pixels = coarse_inputs(micro.specs["image_encoder"], seed=1)["pixel_values"]
    wanted = micro.modules["image_encoder"](torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(encoder(pixel_values=pixels).last_hidden_state, wanted, atol=1e-4)
    assert encoder.config.patch_size == micro.config.vision.patch_size
