"""A second ControlNet's weights: every published layout becomes the same network, and what is none is refused."""
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from caphuman_edge.export.diffusers_names import CONTROLNET, official_names, to_diffusers, to_official
from caphuman_edge.export.random_weights import official_shapes, write_checkpoints
from caphuman_edge.export.weights import WeightFiles, load_model
from caphuman_edge.ref.capface import CapFace
from caphuman_edge.ref.checkpoints import load_strictly
from caphuman_edge.runtime.contract import FULL, NANO, TextConfig, UNetConfig, VaeConfig, VisionConfig
from caphuman_edge.runtime.errors import CheckpointError

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
SMALL = dataclasses.replace(
    NANO, height=64, width=64,
    unet=UNetConfig(model_channels=8, channel_mult=(1, 2, 2, 4), attention_levels=(0, 1, 2), num_heads=2,
                    norm_groups=4, context_width=16, hint_widths=(4, 6, 8, 10)),
    text=TextConfig(width=16, layers=1, heads=2, vocabulary=64),
    vision=VisionConfig(width=16, layers=1, heads=2, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 2), num_res_blocks=1, norm_groups=4))
PREFIX = "control_model."
SETTINGS = {"_class_name": "ControlNetModel", "cross_attention_dim": 16, "attention_head_dim": 2, "in_channels": 4,
            "conditioning_channels": 3, "global_pool_conditions": False, "norm_num_groups": 4,
            "controlnet_conditioning_channel_order": "rgb"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("weights"), SMALL, seed=3, controlnet=True)


@pytest.fixture(scope="module")
def net(files):
    """The ControlNet's weights under bare official names."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(files["controlnet"]).items()}


def saved(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def diffusers_folder(folder, net, **settings):
    saved(folder / "diffusion_pytorch_model.safetensors", to_diffusers(CONTROLNET, net, SMALL))
    (folder / "config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def loaded(files, controlnet):
    model, origins = load_model(WeightFiles(files["caphuman"], controlnet=controlnet), SMALL)
    return model, [origin for origin in origins if origin.part == "controlnet"]


def refused(files, controlnet):
    """The one-line message of the error."""
    with pytest.raises(CheckpointError) as caught:
        loaded(files, controlnet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names


def test_every_official_name_of_a_published_controlnet_has_one_diffusers_name():
    recorded = json.loads((GOLDEN / "keys_openpose_controlnet_full.json").read_text())["keys"]
    names = official_names(CONTROLNET, FULL)
    assert set(names.values()) == recorded.keys() and len(names) == len(recorded)


@pytest.mark.parametrize(("diffusers", "official"), [
    ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"),
    ("controlnet_cond_embedding.blocks.0.bias", "input_hint_block.2.bias"),
    ("controlnet_cond_embedding.blocks.5.weight", "input_hint_block.12.weight"),
    ("controlnet_cond_embedding.conv_out.weight", "input_hint_block.14.weight"),
    ("controlnet_down_blocks.11.weight", "zero_convs.11.0.weight"),
    ("controlnet_mid_block.bias", "middle_block_out.0.bias"),
    ("down_blocks.2.attentions.1.proj_in.weight", "input_blocks.8.1.proj_in.weight")])
def test_published_names_of_diffusers(diffusers, official):
    assert official_names(CONTROLNET, FULL)[diffusers] == official


def test_a_controlnet_of_diffusers_computes_the_same_here():
    """On a picture of 0..1, at diffusers' conditioning scale of 1, for two texts at two timesteps."""
    diffusers = pytest.importorskip("diffusers")
    sizes = SMALL.unet
    theirs = diffusers.ControlNetModel(
        in_channels=4, layers_per_block=sizes.num_res_blocks, cross_attention_dim=sizes.context_width,
        block_out_channels=[sizes.model_channels * mult for mult in sizes.channel_mult],
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], attention_head_dim=sizes.num_heads,
        norm_num_groups=sizes.norm_groups, conditioning_embedding_out_channels=sizes.hint_widths)
    torch.manual_seed(1)
    theirs.eval().requires_grad_(False)
    for parameter in theirs.parameters():  # its last convolutions are zero
        parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = CapFace(dataclasses.replace(sizes, hint_channels=3), mask_head=False).eval().requires_grad_(False)
    load_strictly(ours, to_official(CONTROLNET, theirs.state_dict(), SMALL), "diffusers")
    latent, text, picture = torch.randn(2, 4, 8, 8), torch.randn(2, 7, sizes.context_width), torch.rand(2, 3, 64, 64)
    steps = torch.tensor([17, 801])
    downs, middle = theirs(latent, steps, text, controlnet_cond=picture, return_dict=False)
    found = ours(latent, steps, text, ours.encode_hint(picture))
    assert len(found) == 13
    for one, other in zip(found, [*downs, middle], strict=True):
        assert other.std() > 0.01
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# --- layouts


def write_official(folder, net):
    return saved(folder / "pose.safetensors", {PREFIX + name: tensor for name, tensor in net.items()})


def write_bare(folder, net):
    return saved(folder / "pose.safetensors", net)


def write_pth(folder, net):
    torch.save({PREFIX + name: tensor for name, tensor in net.items()}, folder / "pose.pth")
    return folder / "pose.pth"


def write_nested_ckpt(folder, net):
    torch.save({"state_dict": net}, folder / "pose.ckpt")
    return folder / "pose.ckpt"


def write_with_a_backbone(folder, net):
    """As the first ControlNets were published: with all of Stable Diffusion."""
    backbone = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, 4, 3, 3),
                "first_stage_model.decoder.conv_in.weight": torch.ones(1), "betas": torch.ones(1),
                "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(1)}
    return saved(folder / "all.safetensors", backbone | {PREFIX + name: tensor for name, tensor in net.items()})


def write_diffusers_file(folder, net):
    return saved(folder / "pose.safetensors", to_diffusers(CONTROLNET, net, SMALL))


def write_diffusers_folder(folder, net):
    return diffusers_folder(folder / "pose", net)


def write_diffusers_pipeline(folder, net):
    diffusers_folder(folder / "controlnet", net)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionControlNetPipeline"}')
    return folder


@pytest.mark.parametrize("write", [write_official, write_bare, write_pth, write_nested_ckpt, write_with_a_backbone,
                                   write_diffusers_file, write_diffusers_folder, write_diffusers_pipeline])
def test_every_layout_is_the_same_network(files, net, tmp_path, write):
    model, (origin,) = loaded(files, write(tmp_path, net))
    held = model.pose_control_model.state_dict()
    assert held.keys() == net.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in net.items())
    assert origin.tensors == len(net) and origin.dtypes == ("float32",)


def test_a_halved_shard_of_a_folder_is_told_as_it_is(files, net, tmp_path):
    folder = diffusers_folder(tmp_path / "pose", {name: tensor.half() for name, tensor in net.items()})
    model, (origin,) = loaded(files, folder)
    assert (origin.file, origin.dtypes) == ("pose/diffusion_pytorch_model.safetensors", ("float16",))
    assert model.pose_control_model.zero_convs[3][0].weight.dtype == torch.float32


def test_without_one_a_model_has_none(files):
    model, origins = loaded(files, None)
    assert not hasattr(model, "pose_control_model") and origins == []


# --- what is no ControlNet for Stable Diffusion 1.5


def test_names_that_lack_or_that_nobody_knows_are_told(files, net, tmp_path):
    broken = {name: tensor for name, tensor in net.items() if name != "middle_block_out.0.bias"}
    message = refused(files, write_bare(tmp_path, broken | {"task_embedding": torch.ones(1)}))
    assert "1 unknown (pose_control_model.task_embedding)" in message
    assert "1 missing (pose_control_model.middle_block_out.0.bias)" in message


@pytest.mark.parametrize(("extra", "said"), [
    ({"label_emb.0.0.weight": (4, 4)}, "seems to be a ControlNet for SDXL, expected a ControlNet for Stable Diffusion"),
    ({"lora_controlnet": (1,)}, "seems to be a Control-LoRA"),
    ({"difference": (1,)}, "seems to be a ControlNet stored as its difference from a UNet")])
def test_other_kinds_that_look_like_one_are_called_by_name(files, net, tmp_path, extra, said):
    marked = net | {name: torch.ones(shape) for name, shape in extra.items()}
    assert said in refused(files, write_bare(tmp_path, marked))


@pytest.mark.parametrize(("names", "said"), [
    (("controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight"), "a ControlNet for SDXL"),
    (("adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight"), "a T2I adapter, expected a ControlNet"),
    (("body.0.block1.weight", "conv_in.weight"), "a T2I adapter"), (("body.0.in_conv.weight",), "a T2I adapter"),
    (("lllite_unet_input_blocks_4_1.down.0.weight",), "a ControlNet-LLLite"),
    (("controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"), "such as Flux or SD 3"),
    (("model.diffusion_model.input_blocks.0.0.weight",), "a Stable Diffusion checkpoint")])
def test_other_controls_are_called_by_name(files, tmp_path, names, said):
    path = saved(tmp_path / "other.safetensors", {name: torch.ones(4, 4, 3, 3) for name in names})
    assert said in refused(files, path)


@pytest.mark.parametrize("write", [write_official, write_diffusers_file])
def test_one_for_stable_diffusion_2_is_refused_by_the_width_of_its_tokens(files, net, tmp_path, write):
    wide = {name: torch.ones(tensor.shape[0], 1024) if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
            else tensor for name, tensor in net.items()}
    assert "seems to be for Stable Diffusion 2.x: its attention reads tokens 1024 wide" in refused(
        files, write(tmp_path, wide))


@pytest.mark.parametrize(("settings", "said"), [
    ({"_class_name": "T2IAdapter"}, "holds a 'T2IAdapter', expected a ControlNetModel"),
    ({"_class_name": "ControlNetUnionModel"}, "holds a 'ControlNetUnionModel'"),
    ({"cross_attention_dim": 2048}, "seems to be for SDXL"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time', expected None"),
    ({"global_pool_conditions": True}, "global_pool_conditions True, expected False"),
    ({"controlnet_conditioning_channel_order": "bgr"}, "controlnet_conditioning_channel_order 'bgr'"),
    ({"conditioning_channels": 1}, "conditioning_channels 1, expected 3")])
def test_a_folder_s_settings_that_do_not_fit_are_refused(files, net, tmp_path, settings, said):
    assert said in refused(files, diffusers_folder(tmp_path / "pose", net, **settings))


def test_a_pipeline_without_a_controlnet_is_refused(files, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "holds no controlnet/" in refused(files, tmp_path)


# --- random ones


def test_a_random_controlnet_has_the_official_names_and_shapes_at_full_size():
    recorded = json.loads((GOLDEN / "keys_openpose_controlnet_full.json").read_text())["keys"]
    whole, without = official_shapes(FULL, controlnet=True), official_shapes(FULL)
    added = {name: shape for name, shape in whole.items() if name not in without}
    assert added == {f"pose_{PREFIX}{name}": tuple(shape) for name, (shape, _) in recorded.items()}


def test_a_random_controlnet_holds_no_zeros_and_is_heard(files, net):
    assert all(tensor.abs().max() > 1e-3 for tensor in net.values())
    model, _ = loaded(files, files["controlnet"])
    assert not torch.equal(net["zero_convs.0.0.weight"], model.control_model.state_dict()["zero_convs.0.0.weight"])
    torch.manual_seed(0)
    latent, text, step = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16), torch.tensor([500])
    hints = [model.pose_control_model.encode_hint(torch.rand(1, 3, 64, 64)) for _ in range(2)]
    residuals = model.pose_control_model(latent, step, text, hints[0])
    assert all(0.05 < residual.std() < 3 for residual in residuals)
    plain, one, other = (model(latent, step, text, pose_hints=given) for given in ([], hints[:1], hints[1:]))
    assert (one - plain).std() > 0.02 and (one - other).std() > 1e-3
