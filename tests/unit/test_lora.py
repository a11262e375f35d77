"""LoRAs in every layout: fused, the network computes what it computes with the branch beside it."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from caphuman_edge.export.diffusers_names import to_official
from caphuman_edge.export.lora import fuse, module_names, read_lora
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.runtime.contract import FULL, NANO, TextConfig, UNetConfig, VaeConfig, VisionConfig
from caphuman_edge.runtime.errors import BadInput, CheckpointError

SMALL = dataclasses.replace(
    NANO, unet=UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), num_heads=2,
                          norm_groups=4, context_width=16, hint_widths=(4, 4, 4, 4)),
    text=TextConfig(width=16, layers=1, heads=2, vocabulary=64),
    vision=VisionConfig(width=16, layers=1, heads=2, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4))
RANK, ALPHA = 2, 5.0
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
ATTENTION = "input_blocks.1.1.transformer_blocks.0."
# official weight: the module's name in diffusers, of a linear layer, a 1x1 and a 3x3 convolution, and a text layer
MODULES = {
    f"{UNET}{ATTENTION}attn2.to_k.weight": "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    f"{UNET}{ATTENTION}attn1.to_out.0.weight": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    f"{UNET}input_blocks.1.1.proj_in.weight": "down_blocks.0.attentions.0.proj_in",
    f"{UNET}input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1",
    f"{TEXT}encoder.layers.0.self_attn.q_proj.weight": "text_model.encoder.layers.0.self_attn.q_proj"}
LINEAR = [name for name in MODULES if "attn" in name]


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) * 0.2 for name, tensor in CapHuman(SMALL).state_dict().items()}


@pytest.fixture(scope="module")
def branches(weights):
    """Branches of the modules above: down (rank, inputs[, 3, 3]) and up (outputs, rank[, 1, 1])."""
    torch.manual_seed(1)
    sides = {}
    for name in MODULES:
        outputs, inputs, *kernel = weights[name].shape
        sides[name] = torch.randn(RANK, inputs, *kernel), torch.randn(outputs, RANK, *(1 for _ in kernel))
    return sides


def added(weight, inputs, down, up, factor):
    """What the layer gives with the branch beside it."""
    if weight.ndim == 2:
        return F.linear(inputs, weight) + factor * F.linear(F.linear(inputs, down), up)
    padding = weight.shape[-1] // 2
    return F.conv2d(inputs, weight, padding=padding) + factor * F.conv2d(F.conv2d(inputs, down, padding=padding), up)


def kohya(branches, names=MODULES, text="lora_te_"):
    tensors = {}
    for name, (down, up) in branches.items():
        module = (text if name.startswith(TEXT) else "lora_unet_") + names[name].replace(".", "_")
        tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up,
                    f"{module}.alpha": torch.tensor(ALPHA)}
    return tensors


def dotted(branches, down_name, up_name, unet="unet.", text="text_encoder.", wrapper=""):
    tensors = {}
    for name, (down, up) in branches.items():
        module = wrapper + (text if name.startswith(TEXT) else unet) + MODULES[name]
        tensors |= {f"{module}.{down_name}.weight": down, f"{module}.{up_name}.weight": up}
    return tensors


def old_processors(branches):
    """diffusers before 0.20: attention alone, named by its processor."""
    tensors = {}
    for name in LINEAR:
        head, last = MODULES[name].removesuffix(".0").rsplit(".", 1)
        module = (f"text_encoder.{head}.to_{last[0]}" if name.startswith(TEXT) else f"unet.{head}.processor.{last}")
        down, up = branches[name]
        tensors |= {f"{module}_lora.down.weight": down, f"{module}_lora.up.weight": up}
    return tensors


OFFICIAL = {name: name.removeprefix(UNET).removeprefix("cond_stage_model.transformer.").removesuffix(".weight")
            for name in MODULES}
LAYOUTS = {  # layout: the tensors, and alpha
    "kohya": (kohya, ALPHA), "kohya, first text encoder": (lambda b: kohya(b, text="lora_te1_"), ALPHA),
    "kohya, official names": (lambda b: kohya(b, OFFICIAL), ALPHA),
    "peft": (lambda b: dotted(b, "lora_A", "lora_B"), RANK),
    "peft, wrapped, with an adapter's name": (
        lambda b: dotted(b, "lora_A.default", "lora_B.default", wrapper="base_model.model."), RANK),
    "diffusers": (lambda b: dotted(b, "lora.down", "lora.up"), RANK),
    "diffusers, text layers": (lambda b: dotted(b, "lora_linear_layer.down", "lora_linear_layer.up"), RANK),
    "no prefix": (lambda b: dotted(b, "lora_A", "lora_B", unet="", text=""), RANK),
    "old processors": (old_processors, RANK)}


def written(folder, tensors, metadata=None, name="lora.safetensors"):
    apart = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(apart, folder / name, metadata)
    return folder / name


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        read_lora(path, SMALL)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_equals_the_branch_beside_the_layer(tmp_path, weights, branches, layout):
    build, alpha = LAYOUTS[layout]
    read = read_lora(written(tmp_path, build(branches)), SMALL)
    assert read.keys() == set(LINEAR if layout == "old processors" else MODULES)
    fused = dict(weights)
    fuse(fused, read, 0.7)
    for name in read:
        inputs = torch.randn(3, weights[name].shape[1], *([6, 6] if weights[name].ndim == 4 else []))
        expected = added(weights[name], inputs, *branches[name], 0.7 * alpha / RANK)
        plain = (F.linear(inputs, fused[name]) if fused[name].ndim == 2
                 else F.conv2d(inputs, fused[name], padding=fused[name].shape[-1] // 2))
        assert torch.allclose(plain, expected, atol=1e-4), name
        assert not torch.equal(fused[name], weights[name])
    assert all(fused[name] is weights[name] for name in weights.keys() - read.keys())


def test_the_network_changes_and_its_first_weights_do_not(tmp_path, weights, branches):
    model = CapHuman(SMALL)
    model.load_state_dict(weights)
    latent, step, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 16)
    with torch.no_grad():
        before = model(latent, step, text)
        fused, kept = dict(weights), {name: tensor.clone() for name, tensor in weights.items()}
        fuse(fused, read_lora(written(tmp_path, kohya(branches)), SMALL), 1.0)
        model.load_state_dict(fused)
        assert (model(latent, step, text) - before).abs().max() > 1e-3
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())


def test_scale_zero_is_identity(tmp_path, weights, branches):
    fused = dict(weights)
    fuse(fused, read_lora(written(tmp_path, kohya(branches)), SMALL), 0.0)
    assert all(torch.equal(fused[name], tensor) for name, tensor in weights.items())


def test_two_loras_add_up(tmp_path, weights, branches):
    read = read_lora(written(tmp_path, kohya(branches)), SMALL)
    twice, once = dict(weights), dict(weights)
    fuse(twice, read, 0.3)
    fuse(twice, read, 0.5)
    fuse(once, read, 0.8)
    assert all(torch.allclose(twice[name], once[name], atol=1e-5) for name in MODULES)


def test_halves_are_fused_in_float32(tmp_path, weights, branches):
    path = written(tmp_path, {name: tensor.half() for name, tensor in kohya(branches).items()})
    fused = dict(weights)
    fuse(fused, read_lora(path, SMALL), 1.0)
    name = LINEAR[0]
    down, up = (side.half().float() for side in branches[name])
    assert torch.allclose(fused[name], weights[name] + ALPHA / RANK * up @ down, atol=1e-6)


def test_a_linear_branch_fits_a_one_by_one_convolution(tmp_path, weights, branches):
    name = f"{UNET}input_blocks.1.1.proj_in.weight"
    down, up = branches[name]
    flat = read_lora(written(tmp_path, kohya({name: (down.flatten(1), up.flatten(1))})), SMALL)
    full = read_lora(written(tmp_path, kohya({name: (down, up)})), SMALL)
    shape = weights[name].shape
    assert torch.equal(flat[name].delta(shape), full[name].delta(shape))


@pytest.mark.parametrize(("settings", "factor"), [
    ({"unet.lora_alpha": 8}, 8 / RANK), ({"lora_alpha": 8}, 8 / RANK),
    ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / RANK**0.5), ({"text_encoder.lora_alpha": 8}, 1.0)])
def test_alpha_may_stand_in_the_file_s_settings(tmp_path, branches, settings, factor):
    tensors = dotted({LINEAR[0]: branches[LINEAR[0]]}, "lora_A", "lora_B")
    path = written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
    assert read_lora(path, SMALL)[LINEAR[0]].factor == pytest.approx(factor)


def test_alpha_may_stand_beside_a_peft_adapter(tmp_path, branches):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": RANK}))
    path = written(tmp_path, dotted({LINEAR[0]: branches[LINEAR[0]]}, "lora_A", "lora_B", wrapper="base_model.model."),
                   name="adapter_model.safetensors")
    assert read_lora(path, SMALL)[LINEAR[0]].factor == 8 / RANK


@pytest.mark.parametrize(("settings", "message"), [
    ("{", "no JSON"), ("[]", "no table"), ('{"unet.lora_alpha": "8"}', "expected a number"),
    ('{"unet.alpha_pattern": {"to_k": 3}}', "module by module")])
def test_settings_that_cannot_be_followed_are_refused(tmp_path, branches, settings, message):
    tensors = dotted({LINEAR[0]: branches[LINEAR[0]]}, "lora_A", "lora_B")
    assert message in refused(written(tmp_path, tensors, {"lora_adapter_metadata": settings}))


def test_every_layer_of_the_full_model_has_one_key_in_each_layout():
    names = module_names(FULL)
    modules = set(names.values())
    unet = [name for name in modules if name.startswith(UNET)]
    # 22 residual blocks of 3 layers and 14 shortcuts; 16 transformers of 12; 3 + 3 scalings; time, in and out: 4
    assert len(unet) == 22 * 3 + 14 + 16 * 12 + 6 + 4
    assert len(modules) - len(unet) == 12 * 6
    assert len(names) == 2 * len(unet) + 12 * 6  # no key stands for two layers


# --- what is refused


def test_names_that_match_nothing_are_listed_in_one_error(tmp_path, branches):
    extra = {"lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8),
             "lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight": torch.ones(8, 2), "stray": torch.ones(1)}
    message = refused(written(tmp_path, kohya(branches) | extra))
    assert "holds 2 names that match no weight" in message
    assert "(lora_unet_down_blocks_9_attentions_0_proj_in, stray)" in message


def test_a_norm_is_no_layer_for_a_branch(tmp_path):
    assert "match no weight" in refused(written(tmp_path, {
        "lora_unet_conv_norm_out.lora_down.weight": torch.ones(2, 8),
        "lora_unet_conv_norm_out.lora_up.weight": torch.ones(8, 2)}))


@pytest.mark.parametrize(("down", "up"), [
    ((RANK, 17), (8, RANK)), ((RANK, 8), (9, RANK)), ((RANK, 8), (8, RANK + 1)), ((0, 8), (8, 0)),
    ((RANK, 8, 3, 3), (8, RANK, 1, 1)), ((RANK, 8), (8, RANK, 3, 3)), ((RANK,), (8, RANK))])
def test_wrong_shapes_are_told_with_the_layer(tmp_path, down, up):
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    message = refused(written(tmp_path, {f"{module}.lora_down.weight": torch.ones(down),
                                         f"{module}.lora_up.weight": torch.ones(up)}))
    assert f"{module} is down {down} and up {up}" in message
    assert "weight (8, 8)" in message


def test_half_a_pair_is_told(tmp_path, branches):
    tensors = kohya({LINEAR[0]: branches[LINEAR[0]]})
    message = refused(written(tmp_path, {name: t for name, t in tensors.items() if "lora_up" not in name}))
    assert "has alpha and down alone, expected down and up" in message


def test_one_layer_in_two_layouts_is_told(tmp_path, branches):
    one = {LINEAR[0]: branches[LINEAR[0]]}
    assert "twice" in refused(written(tmp_path, kohya(one) | dotted(one, "lora_A", "lora_B")))


@pytest.mark.parametrize(("width", "family"), [(2048, "SDXL"), (1024, "Stable Diffusion 2.x")])
def test_a_lora_of_another_family_is_told_by_its_shapes(tmp_path, width, family):
    module = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    message = refused(written(tmp_path, {f"{module}.lora_down.weight": torch.ones(2, width),
                                         f"{module}.lora_up.weight": torch.ones(8, 2)}))
    assert f"is a LoRA for {family}" in message


def test_a_second_text_encoder_is_sdxl(tmp_path, branches):
    module = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    extra = {f"{module}.lora_down.weight": torch.ones(2, 16), f"{module}.lora_up.weight": torch.ones(64, 2)}
    assert "LoRA for SDXL" in refused(written(tmp_path, kohya(branches) | extra))


@pytest.mark.parametrize(("name", "method"), [
    ("lora_unet_conv_in.dora_scale", "DoRA"), ("unet.conv_in.lora_magnitude_vector.weight", "DoRA"),
    ("lora_unet_conv_in.hada_w1_a", "LoHa"), ("lora_unet_conv_in.lokr_w1", "LoKr"),
    ("lora_unet_conv_in.oft_blocks", "OFT"), ("lora_unet_conv_in.a1.weight", "GLoRA"),
    ("lora_unet_conv_in.lora_mid.weight", "LoCon"), ("lora_unet_conv_in.diff", "full differences"),
    ("unet.conv_in.lora_B.bias", "LoRA with biases")])
def test_other_methods_are_refused_by_name(tmp_path, branches, name, method):
    assert f"is {method}" in refused(written(tmp_path, kohya(branches) | {name: torch.ones(8)}))


def test_another_file_is_no_lora(tmp_path):
    path = written(tmp_path, {"decoder.conv_in.weight": torch.ones(1)})
    assert "seems to be an autoencoder (VAE), expected a LoRA" in refused(path)


def test_numbers_that_are_none_are_refused(tmp_path, branches):
    tensors = kohya(branches)
    first = next(iter(tensors))
    tensors[first] = tensors[first].clone()
    tensors[first][0, 0] = float("nan")
    assert "NaN or infinity" in refused(written(tmp_path, tensors))


def test_a_scale_that_is_no_number_is_refused(weights):
    with pytest.raises(BadInput, match="scale is nan"):
        fuse(dict(weights), {}, float("nan"))


def test_a_lora_that_diffusers_saved_is_what_diffusers_computes(tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    sizes = SMALL.unet
    torch.manual_seed(2)
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, layers_per_block=sizes.num_res_blocks, block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=sizes.context_width, attention_head_dim=sizes.num_heads, norm_num_groups=sizes.norm_groups)
    theirs.eval().requires_grad_(False)
    official = to_official("unet", {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, SMALL)
    theirs.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=6, init_lora_weights=False,
                                       target_modules=["to_q", "to_k", "to_out.0", "conv1", "proj_in"]))
    theirs.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    fused = {UNET + name: tensor for name, tensor in official.items()}
    fuse(fused, read_lora(tmp_path / "lora.safetensors", SMALL), 1.0)
    ours = CapHuman(SMALL).unet.eval()
    latent, step, text = torch.randn(1, 4, 8, 8), torch.tensor([301]), torch.randn(1, 7, 16)
    with torch.no_grad():
        expected = theirs(latent, step, text).sample
        ours.load_state_dict(official)
        assert not torch.allclose(ours(latent, step, text), expected, atol=1e-2)
        ours.load_state_dict({name.removeprefix(UNET): tensor for name, tensor in fused.items()})
        assert torch.allclose(ours(latent, step, text), expected, atol=1e-4)
