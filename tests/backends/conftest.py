"""A model as small as 13 residuals allow, to be exported."""
import gc
from types import SimpleNamespace

import pytest
import torch

from caphuman_edge.export.graphs import PreviewDecoder, modules
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.contract import NANO, Config, TextConfig, UNetConfig, VaeConfig, VisionConfig, graphs

MICRO = Config(
    height=64, width=64, identity_width=NANO.identity_width, identity_size=NANO.identity_size, tiny_channels=8,
    unet=UNetConfig(model_channels=8, channel_mult=(1, 1, 2, 2), attention_levels=(2,), num_heads=1, norm_groups=4,
                    context_width=8, hint_widths=(4, 4, 4, 8), prediction="v"),
    text=TextConfig(width=8, layers=1, heads=1),
    vision=VisionConfig(width=8, layers=1, heads=1, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4))


@pytest.fixture(scope="session")
def micro():
    """Its config, graph specs, model (with a second ControlNet), fast decoder, and the modules of its graphs.

    Weights are halves, keep variance, and hold no zero tensor but the unused rows of the vocabulary.
    """
    torch.manual_seed(0)
    model = CapHuman(MICRO, pose_net=True).eval().requires_grad_(False)
    tiny = TinyDecoder(MICRO).eval().requires_grad_(False)
    for parameter in (*model.parameters(), *tiny.parameters()):
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 10
        parameter.copy_((torch.randn_like(parameter) / fan_in**0.5).half())
    model.text_encoder.text_model.embeddings.token_embedding.weight[5:49_000] = 0
    preview = PreviewDecoder(torch.randn(3, 4, 1, 1).half().float(), torch.zeros(3)).requires_grad_(False)
    return SimpleNamespace(config=MICRO, specs=graphs(MICRO), model=model, preview=preview, tiny=tiny,
                           modules=modules(model, preview, tiny))


@pytest.fixture(scope="module")
def quick_collections():
    """coremltools collects garbage at every conversion: keep what is imported out of it."""
    gc.freeze()
    yield
    gc.unfreeze()
