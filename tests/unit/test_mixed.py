"""Palettes of several sizes: what a layer's palette does to a graph, and the search for the smallest that fit."""
import itertools
from math import ceil, log2, sqrt

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from caphuman_edge.export.palette import palettise
from caphuman_edge.quant.mixed import PALETTES, as_recipe, search, steps_down
from caphuman_edge.quant.recipe import FOLDER, palette_bits, read_recipe
from caphuman_edge.quant.rewrite import quantize_model

BLOCKS = {"unet.first": ("unet.first.0.weight", "unet.first.1.weight"), "unet.second": ("unet.second.weight",),
          "control.third": ("control.third.weight",)}
SIZES = {"unet.first": 4000, "unet.second": 1000, "control.third": 1000}  # weights
ALONE = {"unet.first": (0.001, 0.002, 0.008), "unet.second": (0.001, 0.010, 0.050),
         "control.third": (0.0, 0.001, 0.004)}


class Sum:
    """A probe whose errors add up in squares, times a factor that the search cannot foresee."""

    def __init__(self, louder: float = 1.0):
        self.louder, self.measured = louder, 0

    def error_of(self, treatment_of) -> float:
        self.measured += 1
        palettes = {block: treatment_of(unit[0]) for block, unit in BLOCKS.items()}
        assert all(treatment_of(name) == palettes[block] for block, unit in BLOCKS.items() for name in unit)
        return self.error_with(palettes)

    def error_with(self, palettes) -> float:
        return self.louder * sqrt(sum(error(block, palette) ** 2 for block, palette in palettes.items()))


def error(block, palette):
    return ALONE[block][PALETTES.index(palette)]


def size(unit):
    return next(SIZES[block] for block, found in BLOCKS.items() if found == unit)


def bits(chosen):
    return sum(palette_bits(palette) * SIZES[block] for block, palette in chosen.items())


def test_steps_go_from_fine_to_coarse_and_the_cheapest_a_byte_come_first():
    steps = steps_down(BLOCKS, error, size)
    assert len(steps) == 6
    for block in BLOCKS:
        assert [step.palette for step in steps if step.block == block] == ["palette-6", "palette-4"]
    assert [step.block for step in steps[:2]] == ["unet.first", "control.third"]  # 3e-9 and 4e-9 a byte
    assert steps[4:] == [("unet.second", "palette-6"), ("unet.second", "palette-4")]


@pytest.mark.parametrize("louder", [0.4, 1.0, 1.5])
@pytest.mark.parametrize("budget", [0.004, 0.012, 0.02, 0.2])
def test_the_search_goes_down_as_far_as_the_measured_error_allows(budget, louder):
    steps, probe, lines = steps_down(BLOCKS, error, size), Sum(louder), []
    chosen, found = search(probe, BLOCKS, steps, budget, lines.append)
    assert found == probe.error_with(chosen) <= budget
    down = sum(PALETTES.index(palette) for palette in chosen.values())
    if down < len(steps):
        block, palette = steps[down]
        assert probe.error_with({**chosen, block: palette}) > budget  # one step more is one too many
    assert probe.measured <= ceil(log2(len(steps) + 1)) + 1 and len(lines) == probe.measured


@pytest.mark.parametrize("budget", [0.004, 0.012, 0.02, 0.2])
def test_what_it_finds_is_nearly_the_smallest_mix_within_the_budget(budget):
    chosen, _ = search(Sum(), BLOCKS, steps_down(BLOCKS, error, size), budget)
    every = [dict(zip(BLOCKS, palettes, strict=True)) for palettes in itertools.product(PALETTES, repeat=3)]
    assert bits(chosen) <= 1.1 * min(bits(one) for one in every if Sum().error_with(one) <= budget)


def test_a_budget_that_eight_bits_miss_leaves_eight_bits_everywhere():
    chosen, found = search(Sum(), BLOCKS, steps_down(BLOCKS, error, size), 1e-6)
    assert set(chosen.values()) == {"palette-8"} and found > 1e-6


def test_the_recipe_that_is_written_says_the_same_and_keeps_floats():
    recipe = as_recipe(read_recipe(FOLDER / "coreml.json"), {"unet.second": "palette-4"}, "here")
    assert recipe.treatment("unet", "unet.second.weight") == "palette-4"
    assert recipe.treatment("unet", "unet.other.weight") == "palette-8"
    assert recipe.treatment("unet", "unet.out.2.weight") == "float"
    assert recipe.treatment("text_encoder", "any.weight") == "weights" and recipe.measured_on == "here"


def test_a_graph_computes_with_the_palettes_values():
    rng = np.random.default_rng(0)
    weight, tokens = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    given = ir.val("tokens", ir.DataType.FLOAT, ir.Shape((4, 6)))
    held = ir.val("linear.weight", ir.DataType.FLOAT, ir.Shape((6, 5)), const_value=ir.tensor(weight))
    node = ir.node("MatMul", [given, held])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape((4, 5))
    graph = ir.Graph([given], [node.outputs[0]], nodes=[node], name="layer", opset_imports={"": 18})
    graph.register_initializer(held)
    model = ir.Model(graph, ir_version=10)
    assert quantize_model(model, lambda name: "palette-4", {}, round_outputs=True) == {"palette-4": 1}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    values, places = palettise(weight, 4)
    (found,) = session.run(None, {"tokens": tokens})
    np.testing.assert_allclose(found, tokens @ values[places].reshape(weight.shape), atol=1e-5)
    assert not np.allclose(found, tokens @ weight, atol=1e-3)
