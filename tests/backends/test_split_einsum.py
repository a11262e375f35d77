"""The Neural Engine's form of attention: the same numbers, from the same weights."""
import dataclasses

import pytest
import torch
from torch import nn

from caphuman_edge.export.graphs import example_inputs, modules
from caphuman_edge.export.split_einsum import split_einsum
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.clip import SelfAttention
from caphuman_edge.ref.unet import Attention
from caphuman_edge.runtime.contract import graphs
from caphuman_edge.runtime.selftest import psnr_db

REWRITTEN = ("unet", "capface", "controlnet", "denoiser", "text_encoder", "image_encoder")


@pytest.fixture(scope="module")
def two_heads(micro):
    """The micro model with two heads everywhere, pooled keys and no trivial layer norm, and its graphs' specs."""
    config = dataclasses.replace(micro.config, unet=dataclasses.replace(micro.config.unet, num_heads=2, key_pooling=2),
                                 text=dataclasses.replace(micro.config.text, heads=2),
                                 vision=dataclasses.replace(micro.config.vision, heads=2))
    model = CapHuman(config, pose_net=True).eval().requires_grad_(False)
    model.load_state_dict(micro.model.state_dict())
    return modules(model, micro.preview), graphs(config)


def outputs(module, spec, seed=5, batch=2):
    with torch.no_grad():
        answer = module(*example_inputs(spec.inputs, seed, batch).values())
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("name", REWRITTEN)
def test_outputs_equal_the_reference(two_heads, name):
    parts, specs = two_heads
    wanted = outputs(parts[name], specs[name])
    found = outputs(split_einsum(parts[name]), specs[name])
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert psnr_db(one.numpy(), other.numpy()) > 100


@pytest.mark.parametrize("name", REWRITTEN)
def test_attention_is_rewritten_without_linear_layers(two_heads, name):
    original, twin = two_heads[0][name], split_einsum(two_heads[0][name])
    assert any(isinstance(module, (Attention, SelfAttention)) for module in original.modules())
    assert not any(isinstance(module, (Attention, SelfAttention, nn.LayerNorm)) for path, module in
                   twin.named_modules() if "final_layer_norm" not in path and "pre_layrnorm" not in path
                   and "post_layernorm" not in path)
    linears = [path for path, module in twin.named_modules() if isinstance(module, nn.Linear)]
    assert all("time_embed" in path or "emb_layers" in path for path in linears)


def test_a_token_does_not_see_later_ones(two_heads):
    parts, specs = two_heads
    twin, (ids,) = split_einsum(parts["text_encoder"]), example_inputs(specs["text_encoder"].inputs, 3, 1).values()
    changed = ids.clone()
    changed[:, 40:] = 2  # a word that the micro model knows
    with torch.no_grad():
        before, after = twin(ids), twin(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_weights_are_shared_and_the_original_is_as_it_was(two_heads):
    original = two_heads[0]["unet"]
    names = [(path, type(module)) for path, module in original.named_modules()]
    twin = split_einsum(original)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in original.parameters()}
    assert [(path, type(module)) for path, module in original.named_modules()] == names


def test_a_module_without_transformers_comes_back_as_it_is(micro):
    spec, module = micro.specs["vae_decoder"], micro.modules["vae_decoder"]
    assert torch.equal(*(outputs(one, spec, batch=1)[0] for one in (module, split_einsum(module))))
