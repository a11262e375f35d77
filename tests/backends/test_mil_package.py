"""Packages that are damaged, foreign or not to be trusted, and inputs that do not fit: each is one clear error."""
import importlib
import json
import shutil

import numpy as np
import pytest

from caphuman_edge.export.mil import load_program
from caphuman_edge.runtime.errors import BundleError, ShapeMismatch

ct = pytest.importorskip("coremltools")
pytestmark = pytest.mark.usefixtures("quick_collections")
mb = ct.converters.mil.Builder
Model = importlib.import_module("coremltools.proto.Model_pb2").Model
MIL = importlib.import_module("coremltools.proto.MIL_pb2")

X = np.array([[0.5, -1.25, 3, 300]], np.float32)


def package(build, folder):
    """A package of one function, written by coremltools without any optimisation."""
    program = mb.program(input_specs=[mb.TensorSpec(shape=(1, 4))], opset_version=ct.target.iOS17)(build)
    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
                       compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY,
                       skip_model_load=True)
    model.save(str(folder / "model.mlpackage"))
    return folder / "model.mlpackage"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A package with a weight file, to be damaged."""
    return package(lambda x: mb.linear(x=mb.softmax(x=mb.relu(x=x), axis=-1), weight=np.ones((10, 4), np.float32)),
                   tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize("inputs, message", [
    ({}, r"takes \['x'\], got \[\]"), ({"x": X, "y": X}, r"takes \['x'\], got \['x', 'y'\]"),
    ({"x": X[0]}, r"x is float32 \[4\], expected float32 \[1, 4\]"),
    ({"x": X[:, :3]}, r"x is float32 \[1, 3\], expected float32 \[1, 4\]"),
    ({"x": X.astype(complex)}, "x is complex128"),
])
def test_other_inputs_than_the_package_declares_are_refused(sound, inputs, message):
    with pytest.raises(ShapeMismatch, match=message):
        load_program(sound)(inputs)


def manifest_of(change):
    """Damage to the manifest."""
    def damage(path):
        content = json.loads((path / "Manifest.json").read_text())
        change(content)
        (path / "Manifest.json").write_text(json.dumps(content))
    return damage


def model_of(change):
    """Damage to the specification; `change` gets the model, and the operations of its function by type."""
    def damage(path):
        file = path / "Data/com.apple.CoreML/model.mlmodel"
        model = Model.FromString(file.read_bytes())
        operations = model.mlProgram.functions["main"].block_specializations["CoreML7"].operations
        change(model, {operation.type + "." + operation.outputs[0].name: operation for operation in operations})
        file.write_bytes(model.SerializeToString())
    return damage


def weights_of(change):
    """Damage to the weight file."""
    def damage(path):
        file = path / "Data/com.apple.CoreML/weights/weight.bin"
        file.write_bytes(change(file.read_bytes()))
    return damage


def specification_of(change):
    """Damage to the specification's bytes."""
    def damage(path):
        file = path / "Data/com.apple.CoreML/model.mlmodel"
        file.write_bytes(change(file.read_bytes()))
    return damage


def weight(operations):
    """The value of the weight constant."""
    return next(operation.attributes["val"] for operation in operations.values()
                if operation.type == "const" and operation.attributes["val"].HasField("blobFileValue"))


def axis(operations):
    """The value of the one integer that the program holds itself."""
    return next(operation.attributes["val"] for name, operation in operations.items()
                if operation.type == "const" and "axis" in name)


def value(number, **fields):
    """A scalar of the numbered element type, held by the program itself."""
    made = MIL.Value()
    made.type.tensorType.dataType = number
    for field, numbers in fields.items():
        getattr(made.immediateValue.tensor, field).values.extend(numbers)
    return made


def item(manifest):
    """The manifest's entry for the specification."""
    return manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]


DAMAGES = {
    "no manifest": (lambda path: (path / "Manifest.json").unlink(), "is no .mlpackage: expected a folder"),
    "manifest no JSON": (lambda path: (path / "Manifest.json").write_text("{"), "names no model"),
    "manifest a list": (lambda path: (path / "Manifest.json").write_text("[]"), "names no model"),
    "root unknown": (manifest_of(lambda m: m.update(rootModelIdentifier="x")), "names no model"),
    "path outside": (manifest_of(lambda m: item(m).update(path="../Manifest.json")), "is no file in the package"),
    "path absent": (manifest_of(lambda m: item(m).update(path="model")), "is no file in the package"),
    "specification truncated": (specification_of(lambda b: b[:len(b) // 2]), "is no Core ML specification"),
    "specification empty": (specification_of(lambda b: b""), "holds a model without type, expected an mlProgram"),
    "specification of noise": (specification_of(lambda b: bytes(range(255, 0, -1))), "is no Core ML specification"),
    "a neural network": (model_of(lambda m, o: m.neuralNetwork.layers.add()), "holds a neuralNetwork"),
    "no main function": (model_of(lambda m, o: m.mlProgram.functions.clear()), r"has functions \[\], expected 'main'"),
    "no block": (model_of(lambda m, o: setattr(m.mlProgram.functions["main"], "opset", "CoreML99")),
                 "has no block for its opset 'CoreML99'"),
    "unknown op": (model_of(lambda m, o: setattr(o["relu.relu_0"], "type", "rnn")),
                   r"op 'rnn' \(relu_0\) is not known"),
    "control flow": (model_of(lambda m, o: o["relu.relu_0"].blocks.add()), "relu relu_0 has blocks of its own"),
    "unknown parameter": (model_of(lambda m, o: o["relu.relu_0"].inputs["alpha"].CopyFrom(
        o["relu.relu_0"].inputs["x"])), r"relu 'relu_0' has parameters \['alpha', 'x'\], expected \['x'\]"),
    "undefined name": (model_of(lambda m, o: setattr(o["relu.relu_0"].inputs["x"].arguments[0], "name", "z")),
                       "x of relu relu_0 is 'z', which nothing before has defined"),
    "defined twice": (model_of(lambda m, o: setattr(o["relu.relu_0"].outputs[0], "name", "x")), "defines 'x' twice"),
    "other outputs": (model_of(lambda m, o: setattr(m.description.output[0], "name", "z")),
                      r"describes outputs \['z'\]"),
    "other element type": (model_of(lambda m, o: setattr(weight(o).type.tensorType, "dataType", 10)),
                           r"has type 2 and 160 bytes, expected type 1 \(float16\) and 80"),
    "unknown element type": (model_of(lambda m, o: setattr(weight(o).type.tensorType, "dataType", 99)),
                             "has element type 99"),
    "number too large": (model_of(lambda m, o: axis(o).CopyFrom(value(21, ints=[300]))),
                         "has numbers that int8 does not hold"),
    "number of another kind": (model_of(lambda m, o: axis(o).CopyFrom(value(23, floats=[1.5]))),
                               "has 1 floats, expected 1 for int32"),
    "too many numbers": (model_of(lambda m, o: axis(o).CopyFrom(value(23, ints=[1, 2]))),
                         "has 2 ints, expected 1 for int32"),
    "constant of another type": (
        model_of(lambda m, o: setattr(o["const.softmax_0_axis_0"].outputs[0].type.tensorType, "dataType", 11)),
        "expected one output and a val of its type"),
    "constant of nothing": (model_of(lambda m, o: o["const.softmax_0_axis_0"].outputs.pop()),
                            "expected one output and a val of its type"),
    "no number": (model_of(lambda m, o: axis(o).immediateValue.Clear()), "is a constant without a value"),
    "enormous weight": (model_of(lambda m, o: setattr(weight(o).type.tensorType.dimensions[0].constant, "size", 2**60)),
                        "has type 2 and 160 bytes, expected type 2"),
    "record beyond the file": (model_of(lambda m, o: setattr(weight(o).blobFileValue, "offset", 2**40)),
                               "points at byte 1099511627776"),
    "weights outside": (model_of(lambda m, o: setattr(weight(o).blobFileValue, "fileName", "@model_path/../../../x")),
                        "expected a file below @model_path"),
    "weights absolute": (model_of(lambda m, o: setattr(weight(o).blobFileValue, "fileName", "/etc/passwd")),
                         "expected a file below @model_path"),
    "weights missing": (lambda path: (path / "Data/com.apple.CoreML/weights/weight.bin").unlink(), "is no blob file"),
    "weights empty": (weights_of(lambda b: b""), "is no blob file"),
    "weights truncated": (weights_of(lambda b: b[:-40]), "the file is truncated"),
    "records truncated": (weights_of(lambda b: b[:100]), r"points at byte 64 of 100"),
    "weights of noise": (weights_of(lambda b: b[:64] + bytes(len(b) - 64)), "has type 0 and 0 bytes"),
    "weights of another format": (weights_of(lambda b: b[:4] + b"\x01" + b[5:]), "has blob format 1, expected 2"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_package_is_one_clear_error(sound, tmp_path, kind):
    damage, message = DAMAGES[kind]
    path = tmp_path / "model.mlpackage"
    shutil.copytree(sound, path)
    damage(path)
    with pytest.raises(BundleError, match=message) as error:
        load_program(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_op_that_fails_or_gives_another_shape_is_named(sound, tmp_path):
    path = tmp_path / "model.mlpackage"
    shutil.copytree(sound, path)
    model_of(lambda m, o: setattr(o["relu.relu_0"].outputs[0].type.tensorType.dimensions[1].constant, "size", 5))(path)
    with pytest.raises(BundleError, match=r"relu 'relu_0' has shape \[1, 4\], the program declares \[1, 5\]"):
        load_program(path)({"x": X})
    path = package(lambda x: mb.gather(x=x, indices=mb.cast(x=x, dtype="int32"), axis=1), tmp_path)
    with pytest.raises(BundleError, match=r"gather '\w+' cannot be evaluated \(indices -1\.\.300 leave 0\.\.3\)"):
        load_program(path)({"x": X})
