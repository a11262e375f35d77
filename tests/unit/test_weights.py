"""A build's weights: official order, where each part came from, and a clear error for every wrong file."""
import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from caphuman_edge.export.diffusers_names import OFFICIAL_PREFIX, to_diffusers
from caphuman_edge.export.random_weights import write_checkpoints
from caphuman_edge.export.weights import PARTS, Lora, WeightFiles, load_model, part_of
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import read_checkpoint
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.contract import NANO, TextConfig, UNetConfig, VaeConfig, VisionConfig
from caphuman_edge.runtime.errors import CheckpointError

SMALL = dataclasses.replace(
    NANO, unet=UNetConfig(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), num_heads=2,
                          norm_groups=4, context_width=16, hint_widths=(4, 4, 4, 4)),
    text=TextConfig(width=16, layers=1, heads=2, vocabulary=64),
    vision=VisionConfig(width=16, layers=1, heads=2, image_size=24, patch_size=12),
    vae=VaeConfig(channels=8, channel_mult=(1, 1, 1, 2), num_res_blocks=1, norm_groups=4))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPHUMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("weights"), SMALL, seed=3)


@pytest.fixture(scope="module")
def backbone(files):
    return load_file(files["backbone"])


def loaded(files, **changes):
    """The model's weights and their origins; config SMALL."""
    config = changes.pop("config", SMALL)
    model, origins = load_model(WeightFiles(**{"caphuman": files["caphuman"], **changes}), config)
    return model.state_dict(), origins


def refused(files, **changes):
    """The one-line message of the error."""
    with pytest.raises(CheckpointError) as caught:
        loaded(files, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def write_pipeline(folder, backbone, settings=None, suffix=".safetensors", half=False):
    """The backbone as diffusers saves it. `settings`: contents of the JSON files by their path."""
    stems = {"unet": "diffusion_pytorch_model", "autoencoder": "diffusion_pytorch_model", "text_encoder": "model"}
    for part, stem in stems.items():
        prefix = OFFICIAL_PREFIX[part]
        official = {n.removeprefix(prefix): t for n, t in backbone.items() if n.startswith(prefix)}
        tensors = {n: (t.half() if half else t).contiguous() for n, t in to_diffusers(part, official, SMALL).items()}
        inner = folder / {"autoencoder": "vae"}.get(part, part)
        inner.mkdir(parents=True)
        if suffix.endswith("safetensors"):
            save_file(tensors, inner / (stem + suffix))
        else:
            torch.save(tensors, inner / ((stem if part != "text_encoder" else "pytorch_model") + suffix))
    for name, content in {"model_index.json": {"_class_name": "StableDiffusionPipeline"}, **(settings or {})}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


# --- the official order, and what came from where


def test_later_files_take_the_place_of_earlier_ones(files, backbone):
    weights, _ = loaded(files, backbone=files["backbone"], vae=files["vae"])
    vae, whole = load_file(files["vae"]), read_checkpoint(files["caphuman"])
    for name, tensor in weights.items():
        part = part_of(name)
        expected = {"autoencoder": lambda name: vae[name.removeprefix("first_stage_model.")],
                    "unet": backbone.get, "text_encoder": backbone.get}.get(part, whole.get)(name)
        assert torch.equal(tensor, expected), name


def test_caphuman_alone_is_a_whole_model(files):
    weights, origins = loaded(files)
    assert torch.equal(weights["id_linear.weight"], read_checkpoint(files["caphuman"])["id_linear.weight"])
    assert {origin.file for origin in origins} == {"caphuman.ckpt"}


def test_a_caphuman_without_the_backbone_s_parts_takes_them_from_the_backbone(files, tmp_path):
    whole = read_checkpoint(files["caphuman"])
    own = {name: t for name, t in whole.items() if part_of(name) in ("capface", "projections", "image_encoder")}
    torch.save({"state_dict": own}, tmp_path / "caphuman.ckpt")
    loaded(files, caphuman=tmp_path / "caphuman.ckpt", backbone=files["backbone"])
    assert "no file holds the autoencoder, the text encoder, the unet" in refused(
        files, caphuman=tmp_path / "caphuman.ckpt")


def test_origins_tell_file_hash_size_count_and_type_of_every_part(files, tmp_path, backbone):
    half = saved(tmp_path / "half.safetensors", {name: tensor.half() for name, tensor in backbone.items()})
    lines = []
    _, origins = load_model(WeightFiles(files["caphuman"], half, files["vae"]), SMALL, lines.append)
    told = {origin.part: origin for origin in origins}
    assert list(told) == [part for part in PARTS if part != "controlnet"]
    assert {part: origin.file for part, origin in told.items()} == {
        "unet": "half.safetensors", "text_encoder": "half.safetensors", "autoencoder": "vae.safetensors",
        "capface": "caphuman.ckpt", "projections": "caphuman.ckpt", "image_encoder": "caphuman.ckpt"}
    assert told["unet"].dtypes == ("float16",)
    assert told["capface"].dtypes == ("float32",)
    assert told["unet"].sha256 == sha256_of([half])[half]
    assert told["unet"].bytes == half.stat().st_size
    assert told["projections"].tensors == 4
    assert sum(origin.tensors for origin in origins) == len(CapHuman(SMALL).state_dict())
    assert json.loads(json.dumps(told["unet"].to_json()))["sha256"] == told["unet"].sha256
    assert any("half.safetensors takes the place" in line and "unet" in line for line in lines)
    assert any(line.startswith("unet: ") and "half.safetensors" in line for line in lines)


def test_halves_become_float32_of_the_same_value(files, tmp_path, backbone):
    half = saved(tmp_path / "half.safetensors", {name: tensor.bfloat16() for name, tensor in backbone.items()})
    weights, _ = loaded(files, backbone=half)
    name = "model.diffusion_model.out.2.weight"
    assert weights[name].dtype == torch.float32
    assert torch.equal(weights[name], backbone[name].bfloat16().float())


def test_nothing_is_left_on_the_meta_device_and_nothing_trains(files):
    for config in (SMALL, dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL.unet, prediction="v"))):
        model, _ = load_model(WeightFiles(files["caphuman"]), config)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 16)).isfinite().all()


def test_float32_weights_stay_memory_mapped(files):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    model, _ = load_model(WeightFiles(files["caphuman"], files["backbone"]), SMALL)
    given = (str(files["caphuman"]), str(files["backbone"]))
    mapped = [line for line in maps.read_text().splitlines() if line.endswith(given)]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in mapped]
    held = [parameter.data_ptr() for parameter in model.parameters()]
    assert all(any(start <= pointer < end for start, end in spans) for pointer in held)


def test_prefixed_autoencoders_and_old_text_names_are_understood(files, tmp_path, backbone):
    vae = saved(tmp_path / "vae.safetensors", {f"first_stage_model.{name}": tensor
                                               for name, tensor in load_file(files["vae"]).items()})
    old = saved(tmp_path / "old.safetensors", {
        **{name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in backbone.items()},
        "cond_stage_model.logit_scale": torch.ones(1)})
    weights, _ = loaded(files, backbone=old, vae=vae)
    expected, _ = loaded(files, backbone=files["backbone"], vae=files["vae"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_lora_is_fused_and_told(files, tmp_path):
    lora = saved(tmp_path / "style.safetensors", {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3),
                                                  "lora_unet_conv_in.lora_up.weight": torch.ones(8, 1, 1, 1)})
    plain, _ = loaded(files)
    weights, origins = loaded(files, loras=(Lora(lora, 0.5),))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.allclose(weights[name], plain[name] + 0.5)
    assert (origins[-1].part, origins[-1].file, origins[-1].tensors, origins[-1].lora_scale) == (
        "unet", "style.safetensors", 1, 0.5)
    assert "changed by LoRA style.safetensors at 0.5" in origins[-1].describe()


# --- diffusers folders


@pytest.mark.parametrize(("suffix", "half"), [(".safetensors", False), (".fp16.safetensors", True), (".bin", False)])
def test_a_diffusers_folder_is_the_same_backbone(files, tmp_path, backbone, suffix, half):
    folder = write_pipeline(tmp_path / "model", backbone, suffix=suffix, half=half)
    weights, origins = loaded(files, backbone=folder)
    expected, _ = loaded(files, backbone=files["backbone"])
    assert all(torch.allclose(weights[name], tensor, atol=2e-3 if half else 0) for name, tensor in expected.items())
    assert f"unet/diffusion_pytorch_model{suffix}" in {origin.file for origin in origins}
    assert [origin.part for origin in origins].count("unet") == 1


def write_shards(folder):
    whole = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: whole[name] for name in held}, folder / file)
    places = {name: file for file, held in shards.items() for name in held}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return index, places


def test_shards_are_put_together_and_each_is_an_origin(files, tmp_path, backbone):
    folder = write_pipeline(tmp_path / "model", backbone)
    write_shards(folder / "unet")
    weights, origins = loaded(files, backbone=folder)
    expected, _ = loaded(files, backbone=files["backbone"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert [origin.part for origin in origins].count("unet") == 2


def test_an_index_cannot_lead_out_of_its_folder(files, tmp_path, backbone):
    folder = write_pipeline(tmp_path / "model", backbone)
    index, places = write_shards(folder / "unet")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, "../../../etc/passwd")}))
    assert "not to be trusted" in refused(files, backbone=folder)


def test_a_missing_shard_is_named(files, tmp_path, backbone):
    folder = write_pipeline(tmp_path / "model", backbone)
    _, places = write_shards(folder / "unet")
    (folder / "unet" / next(iter(places.values()))).unlink()
    assert "is missing, one of the shards" in refused(files, backbone=folder)


@pytest.mark.parametrize("inner", ["vae", "."])
def test_an_autoencoder_comes_from_its_folder_or_a_pipeline_s(files, tmp_path, backbone, inner):
    folder = write_pipeline(tmp_path / "model", backbone, {"vae/config.json": {"scaling_factor": 0.18215}})
    weights, origins = loaded(files, vae=folder / inner)
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert torch.equal(weights[name], backbone[name])
    assert {origin.file for origin in origins if origin.part == "autoencoder"} == {
        "vae/diffusion_pytorch_model.safetensors"}


def test_a_single_autoencoder_file_of_diffusers_is_understood(files, tmp_path, backbone):
    folder = write_pipeline(tmp_path / "model", backbone)
    weights, _ = loaded(files, vae=folder / "vae" / "diffusion_pytorch_model.safetensors")
    name = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert torch.equal(weights[name], backbone[name])


@pytest.mark.parametrize(("file", "settings", "message"), [
    ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule 'linear'"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True"),
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "SDXL pipeline"),
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "inpainting pipeline"),
    ("unet/config.json", {"cross_attention_dim": 2048}, "seems to be for SDXL"),
    ("unet/config.json", {"cross_attention_dim": 1024}, r"Stable Diffusion 2.x"),
    ("unet/config.json", {"in_channels": 9}, "inpainting model"),
    ("unet/config.json", {"attention_head_dim": [5, 10, 20, 20]}, "attention_head_dim [5, 10, 20, 20]"),
    ("vae/config.json", {"scaling_factor": 0.13025}, "scaling_factor 0.13025"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act 'gelu'")])
def test_a_folder_s_settings_that_do_not_fit_are_refused(files, tmp_path, backbone, file, settings, message):
    assert message in refused(files, backbone=write_pipeline(tmp_path / "model", backbone, {file: settings}))


def test_settings_that_fit_are_no_matter(files, tmp_path, backbone):
    loaded(files, backbone=write_pipeline(tmp_path / "model", backbone, {
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon", "beta_schedule": "scaled_linear"},
        "unet/config.json": {"cross_attention_dim": 16, "in_channels": 4, "attention_head_dim": [2, 2, 2, 2]}}))


@pytest.mark.parametrize(("content", "message"), [(b"{", "as JSON"), (b"[]", "no table of settings")])
def test_a_damaged_setting_is_named(files, tmp_path, backbone, content, message):
    folder = write_pipeline(tmp_path / "model", backbone)
    (folder / "unet" / "config.json").write_bytes(content)
    assert message in refused(files, backbone=folder)


def test_a_folder_without_weights_or_of_something_else_is_refused(files, tmp_path, backbone):
    folder = write_pipeline(tmp_path / "model", backbone)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no weights" in refused(files, backbone=folder)
    (tmp_path / "empty").mkdir()
    assert "no diffusers folder" in refused(files, backbone=tmp_path / "empty")
    assert "is a folder" in refused(files, caphuman=tmp_path / "empty")


# --- damaged, truncated, swapped and foreign files: each its own error


def cut(path, target, share=0.5):
    data = path.read_bytes()
    target.write_bytes(data[:int(len(data) * share)])
    return target


def test_truncated_files_say_so(files, tmp_path):
    assert "is truncated (its archive has no end)" in refused(
        files, caphuman=cut(files["caphuman"], tmp_path / "caphuman.ckpt"))
    message = refused(files, backbone=cut(files["backbone"], tmp_path / "v1-5.safetensors"))
    size = files["backbone"].stat().st_size
    assert f"is truncated ({size // 2} of {size} bytes)" in message


def test_a_flipped_byte_in_a_zip_is_found_by_its_checksum(files, tmp_path):
    data = bytearray(files["caphuman"].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "caphuman.ckpt").write_bytes(data)
    message = refused(files, caphuman=tmp_path / "caphuman.ckpt")
    assert "is damaged: the checksum of archive/data/" in message


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"<!DOCTYPE html><title>Sign in</title>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    (struct.pack("<Q", 10**12) + b"{}", "no sensible length"), (struct.pack("<Q", 2) + b"[]", "no table"),
    (struct.pack("<Q", 99_999) + b"[" * 99_999, "header is damaged")])
def test_what_is_no_checkpoint_is_told_apart(files, tmp_path, content, message):
    path = tmp_path / "v1-5.safetensors"
    path.write_bytes(content)
    assert message in refused(files, backbone=path)


def test_a_file_that_is_not_there_is_named(files, tmp_path):
    assert "gone.ckpt does not exist" in refused(files, backbone=tmp_path / "gone.ckpt")


@pytest.mark.parametrize(("role", "given", "message"), [
    ("backbone", "caphuman", "seems to be a CapHuman checkpoint, expected a Stable Diffusion 1.x checkpoint"),
    ("caphuman", "backbone", "seems to be a Stable Diffusion checkpoint, expected CapHuman's own"),
    ("backbone", "vae", "seems to be an autoencoder (VAE), expected a Stable Diffusion 1.x checkpoint"),
    ("vae", "backbone", "seems to be a Stable Diffusion checkpoint, expected the KL autoencoder"),
    ("controlnet", "caphuman", "seems to be a CapHuman checkpoint, expected a ControlNet")])
def test_swapped_files_are_told_apart(files, role, given, message):
    assert message in refused(files, **{role: files[given]})


@pytest.mark.parametrize(("names", "message"), [
    ({"lora_unet_conv_in.lora_down.weight": (4, 4)}, "seems to be a LoRA"),
    ({"unet.conv_in.lora_A.weight": (4, 4)}, "seems to be a LoRA"),
    ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "seems to be a ControlNet"),
    ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "ControlNet in diffusers' layout"),
    ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3), "model.diffusion_model.input_blocks.0.0.weight": (1,)},
     "checkpoint with a ControlNet in it"),
    ({"conditioner.embedders.0.transformer.text_model.x": (1,)}, "SDXL"),
    ({"cond_stage_model.model.transformer.resblocks.0.ln_1.weight": (1,)}, "Stable Diffusion 2.x"),
    ({"time_embedding.linear_1.weight": (4, 4), "conv_in.weight": (4, 4, 3, 3)}, "UNet of a diffusers folder"),
    ({"input_blocks.0.0.weight": (4, 4, 3, 3)}, "UNet alone"),
    ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "Flux or SD 3"),
    ({"text_model.embeddings.token_embedding.weight": (4, 4)}, "CLIP text encoder"),
    ({"emb_params": (1, 16)}, "textual-inversion"),
    ({"decoder.layers.0.weight": (4, 4)}, "tiny autoencoder"),
    ({"conv2d_1a.conv.weight": (4, 4)}, "no model known here")])
def test_foreign_files_are_called_by_name(files, tmp_path, names, message):
    path = saved(tmp_path / "other.safetensors", {name: torch.ones(shape) for name, shape in names.items()})
    assert message in refused(files, backbone=path)


@pytest.mark.parametrize(("width", "family"), [(2048, "SDXL"), (1024, "Stable Diffusion 2.x"), (333, "another model")])
def test_another_context_width_is_another_family(files, tmp_path, backbone, width, family):
    changed = {name: torch.ones(tensor.shape[0], width) if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
               else tensor for name, tensor in backbone.items()}
    message = refused(files, backbone=saved(tmp_path / "other.safetensors", changed))
    assert f"seems to be for {family}: its attention reads tokens {width} wide, expected 16" in message


@pytest.mark.parametrize(("channels", "kind"), [(9, "inpainting"), (8, "image-editing"), (5, "depth-guided")])
def test_other_input_channels_are_another_kind_of_model(files, tmp_path, backbone, channels, kind):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    path = saved(tmp_path / "other.safetensors", backbone | {name: torch.ones(8, channels, 3, 3)})
    assert kind in refused(files, backbone=path)


@pytest.mark.parametrize(("extra", "metadata"), [
    ({"v_pred": torch.ones(1)}, None), ({}, {"modelspec.prediction_type": "v"})])
def test_a_model_that_predicts_v_is_refused(files, tmp_path, backbone, extra, metadata):
    path = saved(tmp_path / "v.safetensors", backbone | extra, metadata)
    assert "says that it predicts v" in refused(files, backbone=path)


def test_what_does_not_fit_in_any_file_is_told_in_one_error(files, tmp_path, backbone):
    name = "model.diffusion_model.out.2.weight"
    unet = {n: t for n, t in backbone.items() if n != name} | {"model.diffusion_model.extra": torch.ones(1)}
    vae = load_file(files["vae"]) | {"decoder.conv_in.bias": torch.ones(3)}
    message = refused(files, backbone=saved(tmp_path / "sd.safetensors", unet),
                      vae=saved(tmp_path / "vae.safetensors", vae))
    assert f"sd.safetensors: 1 unknown (model.diffusion_model.extra); 1 missing ({name})" in message
    assert "vae.safetensors: 1 mis-shaped (first_stage_model.decoder.conv_in.bias is (3,) not (16,))" in message


def test_half_a_part_does_not_hide_behind_the_file_before(files, tmp_path, backbone):
    half = {name: tensor for name, tensor in backbone.items() if "output_blocks" not in name}
    assert "missing" in refused(files, backbone=saved(tmp_path / "sd.safetensors", half))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(files, tmp_path, backbone, value):
    name = "model.diffusion_model.time_embed.0.bias"
    broken = backbone[name].clone()
    broken[3] = value
    path = saved(tmp_path / "nan.safetensors", backbone | {name: broken})
    message = refused(files, backbone=path)
    assert f"nan.safetensors holds NaN or infinity, first in {name}" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(files, tmp_path, backbone, dtype):
    name = "model.diffusion_model.out.2.weight"
    path = saved(tmp_path / "q.safetensors", backbone | {name: backbone[name].to(dtype)})
    assert "it is quantised" in refused(files, backbone=path)


def test_another_config_is_an_error_that_shows_both_shapes(files):
    other = dataclasses.replace(SMALL, identity_width=64)
    assert "id_linear.weight is (16, 128) not (16, 64)" in refused(files, config=other)
