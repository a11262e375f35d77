"""int8 graphs: grids, the rewriter against a numpy model of quantised layers, recipes, the search."""
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from caphuman_edge.export.onnx_writer import save
from caphuman_edge.export.random_weights import official_shapes
from caphuman_edge.quant.calibration import photos_in
from caphuman_edge.quant.histogram import Histogram, grid_of, rounded
from caphuman_edge.quant.ranges import grids, load_histograms, observe, save_histograms
from caphuman_edge.quant.recipe import FOLDER, Recipe, read_recipe, recipe_file
from caphuman_edge.quant.rewrite import (
    Grid,
    LayerGrids,
    layers_of,
    quantize_model,
    quantize_weight,
    scores_of,
    weight_scales,
)
from caphuman_edge.quant.sensitivity import block_of, search, with_floats
from caphuman_edge.runtime.contract import FULL
from caphuman_edge.runtime.errors import BadInput

RNG = np.random.default_rng(0)
NAMES = {"model.diffusion_model.": "unet.", "control_model.": "control."}  # as checkpoints and as graphs name modules


def constant(graph, name, array):
    value = ir.val(name, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape), const_value=ir.tensor(array))
    graph.register_initializer(value)
    return value


def network(extra_outputs=()):
    """A convolution (3 to 6 channels, 3x3, padded), its picture as tokens, and a linear layer of them: 6 to 5."""
    weights = {"conv.weight": RNG.normal(size=(6, 3, 3, 3)), "conv.bias": RNG.normal(size=6),
               "linear.weight": RNG.normal(size=(6, 5)), "linear.bias": RNG.normal(size=5)}
    picture = ir.val("picture", ir.DataType.FLOAT, ir.Shape((1, 3, 8, 8)))
    graph = ir.Graph([picture], [], nodes=[], name="network", opset_imports={"": 18})
    held = {name: constant(graph, name, array.astype(np.float32)) for name, array in weights.items()}
    conv = ir.node("Conv", [picture, held["conv.weight"], held["conv.bias"]], attributes={"pads": [1, 1, 1, 1]})
    flat = ir.node("Reshape", [conv.outputs[0], constant(graph, "shape", np.array([1, 6, 64]))])
    tokens = ir.node("Transpose", [flat.outputs[0]], attributes={"perm": [0, 2, 1]})
    product = ir.node("MatMul", [tokens.outputs[0], held["linear.weight"]])
    total = ir.node("Add", [product.outputs[0], held["linear.bias"]])
    graph.extend([conv, flat, tokens, product, total])
    for name, node, shape in (("drawn", conv, (1, 6, 8, 8)), ("tokens", tokens, (1, 64, 6)),
                              ("answer", total, (1, 64, 5))):
        node.outputs[0].name, node.outputs[0].shape = name, ir.Shape(shape)
        node.outputs[0].dtype = ir.DataType.FLOAT
    graph.outputs.extend([total.outputs[0], *(conv.outputs[0] for name in extra_outputs if name == "drawn")])
    return ir.Model(graph, ir_version=10), {name: array.astype(np.float32) for name, array in weights.items()}


def run(model, picture, tmp_path=None, optimised=False):
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    if tmp_path:
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options,
                                           providers=["CPUExecutionProvider"])
    return session.run(None, {"picture": picture})


def convolved(picture, weight, bias):
    padded = np.pad(picture[0], ((0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))  # (3, 8, 8, 3, 3)
    return np.einsum("cyxij,ocij->oyx", windows, weight)[None] + bias[None, :, None, None]


def stored_weight(weight, axis):
    scales = weight_scales(weight, axis)
    along = [-1 if other == axis else 1 for other in range(weight.ndim)]
    return quantize_weight(weight, scales, axis) * scales.reshape(along)


GRIDS = {"conv.weight": LayerGrids(Grid(0.02, -30), Grid(0.15, 10)), "linear.weight": LayerGrids(Grid(0.12, 4))}


def test_a_grid_is_what_the_runtime_rounds_to():
    values = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    picture = ir.val("picture", ir.DataType.FLOAT, ir.Shape(values.shape))
    graph = ir.Graph([picture], [], nodes=[], opset_imports={"": 18})
    scale, zero = constant(graph, "s", np.float32(0.013)), constant(graph, "z", np.uint8(40 + 128))
    there = ir.node("QuantizeLinear", [graph.inputs[0], scale, zero])
    back = ir.node("DequantizeLinear", [there.outputs[0], scale, zero])
    graph.extend([there, back])
    graph.outputs.append(back.outputs[0])
    found = run(ir.Model(graph, ir_version=10), values)[0]
    np.testing.assert_allclose(found, rounded(values, Grid(float(np.float32(0.013)), 40)), atol=1e-6)


def test_int8_layers_compute_what_a_numpy_model_of_them_does():
    model, weights = network(extra_outputs=["drawn"])
    picture = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    counts = quantize_model(model, lambda name: "int8", GRIDS, round_outputs=True)
    assert counts == {"int8": 2}
    answer, drawn = run(model, picture)
    exact = convolved(rounded(picture, GRIDS["conv.weight"].input), stored_weight(weights["conv.weight"], 0),
                      weights["conv.bias"])
    wanted = rounded(exact, GRIDS["conv.weight"].output)
    assert np.abs(drawn - wanted).max() < 0.151 and np.mean(drawn != wanted.astype(np.float32)) < 0.02  # ties
    tokens = rounded(drawn.reshape(1, 6, 64).transpose(0, 2, 1), GRIDS["linear.weight"].input)
    np.testing.assert_allclose(answer, tokens @ stored_weight(weights["linear.weight"], 1) + weights["linear.bias"],
                               atol=1e-4)


def test_onnx_runtime_computes_both_kinds_in_int8(tmp_path):
    model, _ = network()
    picture = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    quantize_model(model, lambda name: "int8", GRIDS, round_outputs=True)
    plain = run(model, picture)[0]
    np.testing.assert_allclose(run(model, picture, tmp_path, optimised=True)[0], plain, atol=0.2)
    operators = [node.op_type for node in ir.load(tmp_path / "optimised.onnx").graph]
    assert {"QLinearConv", "MatMulIntegerToFloat"} <= {*operators}, operators
    assert not {"Conv", "MatMul", "Gemm"} & {*operators}


def attention():
    """Two attentions over 4 tokens of 2 heads, the second with keys that no layer makes; and their weights."""
    weights = {f"{name}.to_{side}.weight": RNG.normal(size=(8, 8)).astype(np.float32)
               for name, side in (("one", "q"), ("one", "k"), ("two", "q"))}
    tokens = ir.val("picture", ir.DataType.FLOAT, ir.Shape([1, 4, 8]))
    graph = ir.Graph([tokens], [], nodes=[], opset_imports={"": 18})
    stored = {name: constant(graph, name, array) for name, array in weights.items()}
    shape, factor = constant(graph, "heads", np.array([1, 4, 2, 4])), constant(graph, "factor", np.float32(0.5))

    def add(kind, *inputs, shape=None, **attributes):
        node = ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape or [1, 4, 8])
        graph.append(node)
        return node.outputs[0]

    def heads(value, *order, last=(1, 2, 4, 4)):
        return add("Mul", add("Transpose", add("Reshape", value, shape, shape=[1, 4, 2, 4]), perm=order, shape=last),
                   factor, shape=last)

    for name in ("one", "two"):
        queries = heads(add("MatMul", tokens, stored[f"{name}.to_q.weight"]), 0, 2, 1, 3)
        given = add("MatMul", tokens, stored["one.to_k.weight"]) if name == "one" else tokens
        scores = add("MatMul", queries, heads(given, 0, 2, 3, 1), shape=[1, 2, 4, 4])
        graph.outputs.append(add("Softmax", scores, axis=-1, shape=[1, 2, 4, 4]))
    return ir.Model(graph, ir_version=10), weights


def test_queries_and_keys_are_rounded_where_they_meet_and_nowhere_else():
    model, weights = attention()
    (scores,) = scores_of(model.graph)
    assert (scores.queries, scores.keys) == ("one.to_q.weight", "one.to_k.weight")
    tokens = RNG.normal(size=(1, 4, 8)).astype(np.float32)
    before = run(model, tokens)
    grids = {"one.to_q.weight/scores": LayerGrids(Grid(0.05, 0)), "one.to_k.weight/scores": LayerGrids(Grid(0.07, 0))}
    asked = []
    quantize_model(model, lambda name: "float", grids, round_outputs=False,
                   round_scores=lambda name: asked.append(name) or True)
    assert asked == ["one.to_q.weight"]
    one, two = run(model, tokens)
    queries, keys = (rounded((tokens @ weights[f"one.to_{side}.weight"]).reshape(1, 4, 2, 4).transpose(0, 2, 1, 3) / 2,
                             grids[f"one.to_{side}.weight/scores"].input) for side in "qk")
    powers = np.exp(queries @ keys.transpose(0, 1, 3, 2))
    np.testing.assert_allclose(one, powers / powers.sum(-1, keepdims=True), atol=1e-5)
    assert np.abs(one - before[0]).max() > 1e-4
    np.testing.assert_array_equal(two, before[1])


def test_numbers_of_queries_and_keys_are_observed_as_they_meet(tmp_path):
    model, weights = attention()
    ir.save(model, tmp_path / "model.onnx")
    tokens = RNG.normal(size=(1, 4, 8)).astype(np.float32)
    found = observe(tmp_path / "model.onnx", lambda: [{"picture": tokens}])
    assert found["one.to_q.weight/scores"].high == pytest.approx(float((tokens @ weights["one.to_q.weight"]).max()) / 2)
    assert "two.to_q.weight/scores" not in found


def test_a_recipe_tells_which_scores_are_rounded_and_those_of_before_tell_none(tmp_path):
    recipe = Recipe({}, round_scores=("*.attn1.to_q.weight",))
    (tmp_path / "recipe.json").write_text(recipe.to_text())
    assert read_recipe(tmp_path / "recipe.json") == recipe
    assert recipe.rounds_scores("unet.1.attn1.to_q.weight") and not recipe.rounds_scores("unet.1.attn2.to_q.weight")
    assert "round_scores" not in Recipe({}).to_text()
    (tmp_path / "recipe.json").write_text(recipe.to_text().replace('["*.attn1.to_q.weight"]', '[1]'))
    with pytest.raises(BadInput, match="no recipe"):
        read_recipe(tmp_path / "recipe.json")


def test_stored_signed_the_numbers_are_the_same():
    (plain, _), (signed, weights) = network(), network()
    picture = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    for model in (plain, signed):
        for name, array in weights.items():
            model.graph.initializers[name].const_value = ir.tensor(array)
        quantize_model(model, lambda name: "int8", GRIDS, round_outputs=False, signed=model is signed)
    kinds = {node.outputs[0].dtype for node in signed.graph if node.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.INT8}
    np.testing.assert_array_equal(run(signed, picture)[0], run(plain, picture)[0])


def test_which_graphs_a_recipe_rounds():
    recipe = Recipe({"denoiser": (("float", "a"), ("int8", "*")), "vae_decoder": (("weights", "*"),)})
    assert recipe.rounds("unet") and not recipe.rounds("vae_decoder") and not recipe.rounds("text_encoder")


def test_weights_alone_leave_activations_as_they_are():
    model, weights = network()
    picture = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    quantize_model(model, lambda name: "weights", {}, round_outputs=True)
    drawn = convolved(picture, stored_weight(weights["conv.weight"], 0), weights["conv.bias"])
    tokens = drawn.reshape(1, 6, 64).transpose(0, 2, 1)
    wanted = tokens @ stored_weight(weights["linear.weight"], 1) + weights["linear.bias"]
    np.testing.assert_allclose(run(model, picture)[0], wanted, atol=1e-4)
    assert "QuantizeLinear" not in [node.op_type for node in model.graph]


def test_a_channel_without_weights_keeps_its_bias():
    model, _ = network(extra_outputs=["drawn"])
    held = model.graph.initializers["conv.weight"]
    empty = held.const_value.numpy().copy()
    empty[2] = 0
    held.const_value = ir.tensor(empty)
    bias = model.graph.initializers["conv.bias"].const_value.numpy()[2]
    quantize_model(model, lambda name: "int8", GRIDS, round_outputs=False)
    drawn = run(model, np.zeros((1, 3, 8, 8), np.float32))[1]
    np.testing.assert_allclose(drawn[0, 2], bias, rtol=1e-5)


def test_forms_of_a_graph_share_their_int8_weights(tmp_path):
    models = {}
    large = RNG.normal(size=(64, 64, 3, 3)).astype(np.float32)
    for file in ("fused.onnx", "split.onnx"):
        graph = ir.Graph([ir.val("picture", ir.DataType.FLOAT, ir.Shape((1, 64, 8, 8)))], [], nodes=[],
                         opset_imports={"": 18})
        conv = ir.node("Conv", [graph.inputs[0], constant(graph, "conv.weight", large)])
        graph.append(conv)
        graph.outputs.append(conv.outputs[0])
        models[file] = ir.Model(graph, ir_version=10)
        quantize_model(models[file], lambda name: "int8", GRIDS, round_outputs=False)
    save(models, tmp_path)
    assert large.size <= (tmp_path / "weights.bin").stat().st_size < 1.02 * large.size  # a byte a weight, once


def test_layers_are_known_by_their_parameters():
    model, _ = network()
    assert [(layer.name, layer.axis) for layer in layers_of(model.graph)] == [("conv.weight", 0), ("linear.weight", 1)]


def test_ranges_come_from_runs_and_survive_the_disk(tmp_path):
    model, weights = network()
    save({"model.onnx": model}, tmp_path)
    pictures = [{"picture": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32) * scale} for scale in (1, 3)]
    found = observe(tmp_path / "model.onnx", lambda: pictures)
    assert found.keys() == {"conv.weight", "conv.weight/out", "linear.weight"}
    drawn = [convolved(case["picture"], weights["conv.weight"], weights["conv.bias"]) for case in pictures]
    assert found["conv.weight/out"].high == pytest.approx(max(map(np.max, drawn)), rel=1e-5)
    assert found["linear.weight"].counts.sum() == 2 * 64 * 6
    save_histograms(found, tmp_path / "h.npz")
    assert grids(load_histograms(tmp_path / "h.npz"), 0.0, True) == grids(found, 0.0, True)


def test_a_histogram_grows_to_what_it_would_have_been():
    small, large = RNG.normal(size=5000).astype(np.float32), 40 * RNG.normal(size=500).astype(np.float32)
    one, other = Histogram(), Histogram()
    for values in (small, large):
        one.add(values)
    other.add(np.concatenate([large, small]))
    assert one.reach == other.reach and np.abs(one.counts - other.counts).sum() < 20  # bins' edges are float32
    assert (one.low, one.high) == (other.low, other.high)


@pytest.mark.parametrize("affine", [False, True])
def test_the_grid_of_least_squared_error_beats_the_full_range(affine):
    values = np.concatenate([RNG.normal(size=50_000), [25.0]]).astype(np.float32)  # one outlier
    histogram = Histogram()
    histogram.add(values)

    def error(grid):
        return float(((rounded(values.astype(np.float64), grid) - values) ** 2).sum())

    best, full = histogram.grid(0.0, affine), histogram.grid(1.0, affine)
    assert error(best) < 0.95 * error(full)
    assert histogram.squared_error(best) == pytest.approx(error(best), rel=0.05)


def test_a_zero_point_spares_the_empty_side():
    values = np.abs(RNG.normal(size=5000)).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    assert histogram.grid(1.0, True).scale == pytest.approx(values.max() / 255, rel=1e-4)
    assert histogram.grid(1.0, False).scale == pytest.approx(values.max() / 127, rel=0.01)
    assert rounded(np.zeros(1), grid_of(-0.3, 5.0, True))[0] == 0  # padding stays what it is


RECIPE = Recipe({"denoiser": (("float", "unet.out.*"), ("weights", "*.emb_layers.*"), ("int8", "*")),
                 "vae_decoder": (("weights", "*"),)}, 0.999, False, True, "a test")


def test_the_first_rule_that_fits_decides():
    assert RECIPE.treatment("denoiser", "unet.out.2.weight") == "float"
    assert RECIPE.treatment("capface", "control.input_blocks.1.0.emb_layers.1.weight") == "weights"
    assert RECIPE.treatment("unet", "unet.input_blocks.1.0.in_layers.2.weight") == "int8"
    assert RECIPE.treatment("text_encoder", "anything") == "float" and not RECIPE.changes("text_encoder")


def test_a_recipe_is_what_was_written(tmp_path):
    (tmp_path / "onnx.json").write_text(RECIPE.to_text())
    assert read_recipe(tmp_path / "onnx.json") == RECIPE


@pytest.mark.parametrize("change", [
    {"format": 2}, {"clip": 1.5}, {"clip": "most"}, {"affine": 1}, {"rules": []}, {"rules": {"unet": [["int4", "*"]]}},
    {"rules": {"unet": [["int8"]]}}, {"more": 1}])
def test_what_is_no_recipe_is_refused(tmp_path, change):
    path = tmp_path / "onnx.json"
    path.write_text(json.dumps(json.loads(RECIPE.to_text()) | change))
    with pytest.raises(BadInput, match=r"onnx\.json is no recipe of format 1"):
        read_recipe(path)
    path.write_text("{")
    with pytest.raises(BadInput, match="is not JSON"):
        read_recipe(path)


def test_a_recipe_of_ours_is_named_and_of_another_its_file_is(tmp_path):
    mixed = read_recipe(recipe_file(Path("coreml-mixed")))
    assert mixed.precision("unet") == "palettised-mixed" and mixed.precision("vae_decoder") == "int8"
    assert mixed.treatment("unet", "unet.middle_block.0.in_layers.2.weight") == "palette-4"
    assert recipe_file(tmp_path / "onnx.json") == tmp_path / "onnx.json"
    with pytest.raises(BadInput, match="name one of ours: coreml, coreml-mixed, onnx, openvino"):
        read_recipe(recipe_file(Path("coreml-mine")))


@pytest.mark.parametrize("kind", ["onnx", "openvino", "coreml", "coreml-mixed"])
def test_our_recipes_fit_the_full_size(kind):
    """Every pattern finds a layer there, all but a hundredth of the weights become int8."""
    recipe = read_recipe(FOLDER / f"{kind}.json")
    shapes = {graph + name.removeprefix(official): shape for official, graph in NAMES.items()
              for name, shape in official_shapes(FULL).items()
              if name.startswith(official) and len(shape) > 1 and "input_hint_block" not in name}
    patterns = [pattern for _, pattern in recipe.rules["denoiser"]]
    for pattern in patterns:
        assert any(Recipe({"denoiser": (("int8", pattern),)}).treatment("unet", name) == "int8" for name in shapes)
    count = {name: np.prod(shape) for name, shape in shapes.items()}
    left = sum(count[name] for name in shapes if recipe.treatment("denoiser", name) == "float")
    assert left < 0.01 * sum(count.values())


class Sum:
    """Errors add up in squares, times a factor that no single layer shows."""

    def __init__(self, errors, factor):
        self.errors, self.factor = errors, factor

    def error(self, treated):
        return self.factor * float(np.sqrt(sum(self.errors[name] ** 2 for name in treated)))


@pytest.mark.parametrize(("factor", "kept"), [(1.0, ["a"]), (2.0, ["a", "b"]), (1000.0, ["a", "b", "c", "d"])])
def test_the_search_keeps_the_fewest_layers_that_the_budget_allows(factor, kept):
    errors = {"c": 0.02, "a": 0.5, "d": 0.01, "b": 0.06}
    units, error = search(Sum(errors, factor), {(name,): value for name, value in errors.items()}, budget=0.07)
    assert [name for unit in units for name in unit] == kept and error <= 0.07


def test_blocks_become_patterns():
    unit = tuple(f"unet.input_blocks.1.0.{part}.weight" for part in ("in_layers.2", "out_layers.3"))
    found = with_floats(RECIPE, [unit, ("unet.out.2.weight",)], "nano")
    assert found.rules["denoiser"][:2] == (("float", "unet.input_blocks.1.0.*"), ("float", "unet.out.2.weight"))
    assert found.treatment("denoiser", unit[0]) == "float" and found.treatment("denoiser", "unet.input_blocks.10.0.x"
                                                                              ) == "int8"
    assert block_of("control.middle_block.1.transformer_blocks.0.ff.net.2.weight") == "control.middle_block.1"


def test_held_out_pictures_calibrate_nothing(tmp_path):
    for number, name in enumerate(("00299.jpg", "00299_a.jpg", "00300.jpg", "me.png", "notes.txt")):
        if not name.endswith("txt"):
            Image.fromarray(np.full((64, 64, 3), 40 * number, np.uint8)).save(tmp_path / name)
    assert [round(photo.mean() / 40) for photo in photos_in([tmp_path])] == [2, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no photo"):
        list(photos_in([tmp_path / "empty"]))
