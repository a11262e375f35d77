"""Keys of parts: what changes a part changes its key, and nothing else does."""
import copy
import dataclasses

import pytest
import torch

from caphuman_edge.export import part_keys
from caphuman_edge.export.coreml_writer import PHONE
from caphuman_edge.export.graphs import PreviewDecoder, modules
from caphuman_edge.export.lora import Branch, fuse
from caphuman_edge.export.stages import Options
from caphuman_edge.runtime.contract import graphs

ALL = Options(("onnx", "openvino", "coreml", "ort"), storage="f16")
APART = Options(("onnx",), fused=False)
TINY = dataclasses.replace(APART, tiny=True)
ATTENTION = "model.diffusion_model.input_blocks.7.1.transformer_blocks.0.attn1.to_q.weight"


def keys_of(model, preview, options=ALL):
    return part_keys.part_keys(modules(model, preview), graphs(model.config), model.config, options)


def changed(micro, prefix):
    """A copy of the model with other numbers in all tensors whose names begin like this."""
    model = copy.deepcopy(micro.model)
    tensors = [tensor for name, tensor in model.named_parameters() if name.startswith(prefix)]
    for tensor in tensors:
        tensor.mul_(1.5)
    assert tensors
    return model


def redone(before, after):
    """Graphs and folders of which anything would be made again; the jobs are the same."""
    assert before.keys() == after.keys()
    return {name for (stage, name), key in before.items() if after[stage, name] != key}


@pytest.mark.parametrize(("prefix", "graphs_redone"), [
    ("model.", {"denoiser", "unet", "capface"}),  # capface lies in the fused denoiser's folder
    ("control_model.", {"denoiser", "unet", "capface", "hint_encoder"}),
    ("id_linear.", {"hint_encoder"}),
    ("cond_stage_model.", {"text_encoder"}),
    ("control_cond_stage_model.", {"image_encoder"}),
    ("first_stage_model.decoder.", {"vae_encoder", "vae_decoder", "preview_decoder"}),
])
def test_other_weights_redo_the_graphs_that_hold_them(micro, prefix, graphs_redone):
    assert redone(keys_of(micro.model, micro.preview), keys_of(changed(micro, prefix), micro.preview)) == graphs_redone


def test_of_another_unet_what_is_capfaces_alone_stays(micro):
    """In the fused denoiser's folder its ONNX file goes; its answers and its Core ML package do not."""
    before, after = keys_of(micro.model, micro.preview), keys_of(changed(micro, "model."), micro.preview)
    same = {stage for stage, name in before if name == "capface" and before[stage, name] == after[stage, name]}
    assert same == {"reference", "selftest", "coreml", "coreml check"}
    apart = (keys_of(model, micro.preview, APART) for model in (micro.model, changed(micro, "model.")))
    assert redone(*apart) == {"unet"}


def test_a_lora_on_the_unet_redoes_the_unet(micro):
    weights = dict(micro.model.state_dict())
    outputs, inputs = weights[ATTENTION].shape
    fuse(weights, {ATTENTION: Branch(torch.ones(1, inputs), torch.ones(outputs, 1), 0.1)}, 1.0)
    model = copy.deepcopy(micro.model)
    model.load_state_dict(weights)
    before, after = (keys_of(each, micro.preview, APART) for each in (micro.model, model))
    assert redone(before, after) == {"unet"}
    weights[ATTENTION] = micro.model.state_dict()[ATTENTION]
    model.load_state_dict(weights)
    assert keys_of(model, micro.preview, APART) == before  # copied, but of the same numbers


def test_the_fast_decoder_is_a_part_of_its_own(micro):
    """It redoes nothing else where it is added, and itself alone where its weights are others."""
    other = copy.deepcopy(micro.tiny)
    other[1].weight.mul_(1.5)
    without, first, second = (part_keys.part_keys(modules(micro.model, micro.preview, tiny), micro.specs, micro.config,
                                                  options)
                              for tiny, options in ((None, APART), (micro.tiny, TINY), (other, TINY)))
    assert {name for _, name in first.keys() - without.keys()} == {"tiny_decoder"}
    assert all(first[job] == key for job, key in without.items()) and redone(first, second) == {"tiny_decoder"}


def test_a_buffer_that_no_checkpoint_holds_counts(micro):
    model = copy.deepcopy(micro.model)
    model.unet.alphas_cumprod[500] *= 0.9
    assert redone(*(keys_of(each, micro.preview, APART) for each in (micro.model, model))) == {"unet"}


def test_another_size_keeps_the_graphs_that_see_no_pixels_of_it(micro):
    before = keys_of(micro.model, micro.preview, APART)
    wide = dataclasses.replace(micro.config, width=128)
    after = part_keys.part_keys(modules(micro.model, micro.preview), graphs(wide), wide, APART)
    assert redone(before, after) == set(APART.graphs_in("onnx")) - {"text_encoder", "image_encoder"}


def test_heads_that_shapes_do_not_show_count(micro):
    before = keys_of(micro.model, micro.preview, APART)
    other = dataclasses.replace(micro.config, text=dataclasses.replace(micro.config.text, heads=2))
    after = part_keys.part_keys(modules(micro.model, micro.preview), graphs(other), other, APART)
    assert "text_encoder" in redone(before, after) and "image_encoder" not in redone(before, after)


def test_the_last_bits_of_the_preview_do_not_count_but_more_does(micro):
    fitted, again, other = (keys_of(micro.model, PreviewDecoder(torch.full((3, 4, 1, 1), value), torch.zeros(3)))
                            for value in (0.3, 0.3 + 1e-6, 0.31))
    assert again == fitted and redone(fitted, other) == {"preview_decoder"}


@pytest.mark.parametrize(("options", "stages"), [
    ({"storage": "f32"}, {"onnx", "openvino", "ort", "onnx check", "openvino check", "ort check"}),
    ({"coreml": PHONE}, {"coreml", "coreml check"}),
])
def test_an_option_redoes_the_formats_that_it_is_about(micro, options, stages):
    before, after = (keys_of(micro.model, micro.preview, each) for each in (ALL, dataclasses.replace(ALL, **options)))
    assert {stage for stage, name in before if before[stage, name] != after[stage, name]} == stages
    exact = before["onnx", "hint_encoder"] == after["onnx", "hint_encoder"]
    assert exact  # whose weights no option rounds


def test_another_format_beside_it_changes_no_graph(micro):
    """Core ML limits tests to one text; so checks and self-test are others, graphs and answers are not."""
    few, many = (keys_of(micro.model, micro.preview, Options(kinds)) for kinds in (("onnx",), ("onnx", "openvino")))
    assert few.items() <= many.items()
    apple = keys_of(micro.model, micro.preview, Options(("onnx", "coreml")))
    assert {stage for stage, name in few if few[stage, name] != apple[stage, name]} == {"onnx check", "selftest"}


def test_another_library_redoes_what_it_makes_and_what_is_made_of_that(micro, monkeypatch):
    before = keys_of(micro.model, micro.preview)
    monkeypatch.setattr(part_keys, "_version", lambda name: "9" if name == "openvino" else VERSION(name))
    after = keys_of(micro.model, micro.preview)
    assert {stage for stage, name in before if before[stage, name] != after[stage, name]} == {
        "openvino", "openvino check"}
    monkeypatch.setattr(part_keys, "_version", lambda name: "9" if name == "onnxscript" else VERSION(name))
    after = keys_of(micro.model, micro.preview)
    assert {stage for stage, name in before if before[stage, name] == after[stage, name]} == {
        "reference", "selftest", "coreml", "coreml check"}


VERSION = part_keys._version


def test_other_code_redoes_everything(micro, monkeypatch):
    before = keys_of(micro.model, micro.preview)
    monkeypatch.setattr(part_keys, "_code", lambda: "another version")
    after = keys_of(micro.model, micro.preview)
    assert not before.items() & after.items()


def test_the_code_is_that_of_export_and_reference_and_of_what_runs_graphs(monkeypatch, tmp_path):
    before = part_keys._code.__wrapped__()
    for package in (part_keys.export, part_keys.ref, part_keys.backends):
        with monkeypatch.context() as patch:
            (tmp_path / "new.py").write_text(package.__name__)
            patch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
            assert part_keys._code.__wrapped__() != before
    assert part_keys._code.__wrapped__() == before


def test_a_check_is_of_the_machine_that_it_ran_on(micro, monkeypatch):
    before = keys_of(micro.model, micro.preview)
    monkeypatch.setattr(part_keys.platform, "system", lambda: "Another")
    after = keys_of(micro.model, micro.preview)
    assert {stage for stage, name in before if before[stage, name] != after[stage, name]} == {
        f"{kind} check" for kind in ALL.formats}
