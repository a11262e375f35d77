"""Write a Core ML package again with int8 weights and activations, or with palettes of several sizes.

A saved package is read, changed and saved: no checkpoint is needed, and no Mac. Core ML runs int8 layers on the Neural
Engine of the A17, the M4 and later; elsewhere int8 weights and palettes save storage and bandwidth alone. Layers are
known by their parameter's name in the reference, as in ONNX: a package calls it `p_NAME`, dots as underscores.

Activations get the form that Core ML computes in int8: quantize and dequantize before a layer, symmetric, one scale.
"""
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from caphuman_edge.export.coreml_writer import SUFFIX, coremltools, quiet
from caphuman_edge.export.palette import palettise
from caphuman_edge.quant.recipe import Treatment, palette_bits
from caphuman_edge.quant.rewrite import LEVELS, LayerGrids
from caphuman_edge.runtime.errors import BundleError

LAYERS = ("conv", "linear")
CONSTANT, HALF = "p_{}", "_to_fp16"  # names of weights; the suffix is a cast's
ACTIVATIONS = "compression::insert_prefix_quantize_dequantize_pair"
WEIGHTS, PALETTES = "compression::linear_quantize_weights", "compression::palettize_weights"
WEIGHTS_FOLDER = Path("Data/com.apple.CoreML/weights")


@dataclass(frozen=True)
class CoremlLayer:
    """An op of a program that has a constant weight."""

    name: str  # of the weight, as the reference has it
    op: Any

    @property
    def constant(self) -> str:
        """The name of the weight's constant in the program."""
        return str(self.op.inputs["weight"].op.name)


def rewrite_package(source: Path, target: Path, names: Collection[str], treatment_of: Callable[[str], Treatment],
                    grids: Mapping[str, LayerGrids], label: str = "int8") -> dict[Treatment, int]:
    """Write `source`, a package of halves or floats, to `target`, which must not be there; counts layers by treatment.

    `names`: the layers' parameters; others keep their weights. `grids`: of layers treated as "int8", symmetric ones.
    `label`: what the new package says of its precision. Raises BundleError where the package has none of the layers.
    """
    ct = coremltools()
    from coremltools.converters.mil.converter import mil_convert

    model = ct.models.MLModel(str(source), skip_model_load=True)
    spec = model.get_spec()
    spec.description.metadata.userDefined["caphuman.precision"] = label
    program = _program(spec, source)
    layers = layers_of(program, names)
    if not layers:
        raise BundleError(f"{source} has none of the layers of its ONNX form; build the bundle again")
    treatments = {layer.name: treatment_of(layer.name) for layer in layers}
    with quiet():
        mil_convert(
            program, convert_from="milinternal", convert_to="mlprogram", compute_units=model.compute_unit,
            specification_version=spec.specificationVersion, model_description=spec.description, skip_model_load=True,
            main_pipeline=_passes(ct, layers, treatments, grids), package_dir=str(target))
    found = [treatments[layer.name] for layer in layers]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def packages_at(form: Path) -> list[Path]:
    """The packages of a graph that is stored as one, or as a folder of chunks."""
    return [form] if form.suffix == SUFFIX else sorted(form.glob(f"*{SUFFIX}"))


def layers_of(program: Any, names: Collection[str]) -> list[CoremlLayer]:
    """The layers with these parameters, in the program's order."""
    by_constant = {CONSTANT.format(name.replace(".", "_")): name for name in names}
    ops = [op for op in program.functions["main"].operations
           if op.op_type in LAYERS and getattr(op.inputs["weight"].op, "op_type", None) == "const"]
    constants = [(str(op.inputs["weight"].op.name).removesuffix(HALF), op) for op in ops]
    return [CoremlLayer(by_constant[constant], op) for constant, op in constants if constant in by_constant]


def _program(spec: Any, package: Path) -> Any:
    """The package's program, which a saved model does not keep."""
    from coremltools.converters.mil.frontend.milproto.load import load

    return load(spec, spec.specificationVersion, str(package / WEIGHTS_FOLDER))


def _passes(ct: Any, layers: Sequence[CoremlLayer], treatments: Mapping[str, Treatment],
            grids: Mapping[str, LayerGrids]) -> Any:
    """The library's own compressions, told what each layer gets; the program went through all other passes before."""
    coreml = ct.optimize.coreml
    int8 = coreml.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0)
    rounded = [layer for layer in layers if treatments[layer.name] == "int8"]
    reach = {layer.op.inputs["x"].name: LEVELS * grids[layer.name].input.scale for layer in rounded}
    pipeline = ct.PassPipeline([ACTIVATIONS, WEIGHTS, PALETTES])
    pipeline.set_options(ACTIVATIONS, {
        "activation_stats": {name: {"rmin": -most, "rmax": most} for name, most in reach.items()},
        "config": coreml.OptimizationConfig(op_name_configs={layer.op.name: int8 for layer in rounded})})
    pipeline.set_options(WEIGHTS, {"config": coreml.OptimizationConfig(op_name_configs={
        layer.constant: int8 for layer in layers if treatments[layer.name] in ("int8", "weights")})})
    pipeline.set_options(PALETTES, {"config": coreml.OptimizationConfig(op_name_configs={
        layer.constant: coreml.OpPalettizerConfig(mode="custom", lut_function=partial(palettise, bits=bits),
                                                  weight_threshold=0)
        for layer in layers if (bits := palette_bits(treatments[layer.name]))})})
    return pipeline
