"""Core ML as a backend. Only a Mac runs it; elsewhere, its description of a package and its plumbing of arrays."""
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from caphuman_edge.runtime.backends import Graph, open_backend
from caphuman_edge.runtime.backends.coreml import arithmetic, chained, devices, graph_of, load
from caphuman_edge.runtime.contract import TensorSpec
from caphuman_edge.runtime.errors import BadInput, BundleError, MissingExtra, ShapeMismatch

ON_MAC = sys.platform == "darwin"
IDS, SCALE = TensorSpec("input_ids", (1, 77), "int64"), TensorSpec("scale", (1,))
TABLE = np.arange(100, dtype=np.float32)[:, None] * np.float32(0.25)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPHUMAN_CACHE", str(tmp_path / "cache"))


def write_package(path: Path, precision: str = "FLOAT32") -> None:
    """tokens = table[input_ids] * scale, and their sum, as a Core ML package."""
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(input_specs=[mb.TensorSpec((1, 77), types.int32), mb.TensorSpec((1,), types.fp32)],
                opset_version=ct.target.iOS17)
    def program(input_ids, scale):
        rows = mb.gather(x=TABLE, indices=input_ids, axis=0, validate_indices=False)
        tokens = mb.mul(x=rows, y=scale, name="tokens")
        return tokens, mb.reduce_sum(x=tokens, axes=[1, 2], keep_dims=False, name="total")

    path.parent.mkdir(exist_ok=True)
    ct.convert(program, minimum_deployment_target=ct.target.iOS17, compute_precision=ct.precision[precision],
               skip_model_load=True, package_dir=str(path))


@pytest.fixture(params=["FLOAT32", "FLOAT16"])
def package(request, tmp_path) -> Path:
    write_package(tmp_path / "text.mlpackage", request.param)
    return tmp_path / "text.mlpackage"


class Predictor:
    """Stands in for coremltools' model: computes the package's program, and notes what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, np.ndarray] = {}

    def predict(self, arrays: dict[str, np.ndarray]) -> dict[str, object]:
        self.given = arrays
        tokens = TABLE[arrays["input_ids"]] * arrays["scale"]
        return {"tokens": tokens.astype(np.float16), "total": float(tokens.sum())}


def described(path: Path) -> object:
    return pytest.importorskip("coremltools").utils.load_spec(str(path))


def inputs(scale: float = 2.0) -> dict[str, np.ndarray]:
    return {"input_ids": np.arange(77)[None] % 100, "scale": np.array([scale], np.float32)}


def test_a_package_tells_the_contract_s_names_shapes_and_dtypes(package):
    graph = graph_of(package, described(package), Predictor())
    assert graph.inputs == (IDS, SCALE)
    assert graph.outputs == (TensorSpec("tokens", (1, 77, 1)), TensorSpec("total", (1,)))


def test_core_ml_is_given_32_bits_and_gives_float32_in_the_contract_s_shapes(package):
    model = Predictor()
    outputs = graph_of(package, described(package), model)(inputs())
    assert {name: array.dtype for name, array in model.given.items()} == {"input_ids": "int32", "scale": "float32"}
    assert all(array.flags.c_contiguous for array in model.given.values())
    assert {name: (array.dtype, array.shape) for name, array in outputs.items()} == {
        "tokens": (np.float32, (1, 77, 1)), "total": (np.float32, (1,))}
    np.testing.assert_array_equal(outputs["tokens"][0, :, 0], np.arange(77) * 0.5)
    assert outputs["total"][0] == np.arange(77).sum() * 0.5


def test_wrong_arrays_are_refused_before_core_ml_sees_them(package):
    model = Predictor()
    graph = graph_of(package, described(package), model)
    with pytest.raises(ShapeMismatch, match="input_ids is int32, expected int64"):
        graph({**inputs(), "input_ids": np.zeros((1, 77), np.int32)})
    with pytest.raises(BadInput, match=f"input_ids holds {2**40}, expected integers of 32 bits"):
        graph({**inputs(), "input_ids": np.full((1, 77), 2**40)})
    assert model.given == {}


def test_a_failing_prediction_is_one_line_that_names_the_package(package):
    def fail(arrays):
        raise RuntimeError("Unable to compute the prediction\nmore")

    graph = graph_of(package, described(package), SimpleNamespace(predict=fail))
    with pytest.raises(BundleError) as caught:
        graph(inputs())
    assert str(package) in str(caught.value) and "\n" not in str(caught.value)


def test_arithmetic_is_what_operations_give_and_not_how_weights_are_stored(tmp_path):
    for precision, expected in (("FLOAT32", "f32"), ("FLOAT16", "f16")):
        write_package(tmp_path / f"{precision}.mlpackage", precision)
        assert arithmetic(described(tmp_path / f"{precision}.mlpackage")) == expected


def test_a_flexible_length_gets_a_name(package):
    spec = described(package)
    limits = spec.description.input[0].type.multiArrayType.shapeRange.sizeRanges
    for low, high in ((1, 1), (77, 308)):
        limits.add(lowerBound=low, upperBound=high)
    assert graph_of(package, spec, Predictor()).inputs[0].shape == (1, "input_ids.1")


def test_numbers_that_no_graph_has_are_refused(package):
    spec = described(package)
    spec.description.output[0].type.multiArrayType.dataType = 65600  # double
    with pytest.raises(BundleError, match="tokens is an array of DOUBLE, expected FLOAT32"):
        graph_of(package, spec, Predictor())


def test_chunks_run_in_turn_and_hand_on_what_the_next_one_takes():
    latent, text, hidden, eps = (TensorSpec(name, (1,)) for name in ("latent", "text", "hidden", "eps"))
    first = Graph("1", (latent, text), (hidden,), lambda arrays: {"hidden": arrays["latent"] + arrays["text"]})
    last = Graph("2", (hidden, text), (eps,), lambda arrays: {"eps": arrays["hidden"] * arrays["text"]})
    whole = chained(Path("unet"), [first, last])
    assert (whole.inputs, whole.outputs) == ((latent, text), (eps,))
    assert whole({"latent": np.ones(1, np.float32), "text": np.full(1, 3, np.float32)}) == {"eps": 12}
    assert chained(Path("unet"), [last]) is last


class Mac:
    """Stands in for coremltools on a Mac: compiles by copying a name, and loads what was compiled."""

    def __init__(self, ct: object) -> None:
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, str]] = []
        self.__version__, self.utils = "9.0", ct.utils
        self.ComputeUnit = {name: name for name in ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")}
        self.models = SimpleNamespace(utils=SimpleNamespace(compile_model=self.compile), CompiledMLModel=self.open)

    def compile(self, source: str, target: str) -> str:
        self.compiled.append(source)
        Path(target).mkdir()
        (Path(target) / "net").write_text(source)
        return target

    def open(self, path: str, unit: str) -> Predictor:
        assert (Path(path) / "net").exists()
        self.loaded.append((path, unit))
        return Predictor()


@pytest.fixture
def mac(monkeypatch) -> Mac:
    mac = Mac(pytest.importorskip("coremltools"))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr("caphuman_edge.runtime.backends.coreml._tools", lambda: mac)
    return mac


@pytest.mark.parametrize(("device", "unit"), [(None, "ALL"), ("all", "ALL"), ("auto", "ALL"), ("cpu", "CPU_ONLY"),
                                              ("gpu", "CPU_AND_GPU"), ("npu", "CPU_AND_NE")])
def test_a_device_stands_for_core_ml_s_compute_units(mac, package, device, unit):
    graph = load(package, device=device)
    assert [used for _, used in mac.loaded] == [unit]
    np.testing.assert_array_equal(graph(inputs())["tokens"][0, :, 0], np.arange(77) * 0.5)


def test_a_package_is_compiled_once_and_loaded_from_where_it_stays(mac, package, tmp_path):
    written = (package / "Manifest.json").stat().st_mtime_ns
    for device in (None, "cpu"):
        load(package, device=device)
    assert mac.compiled == [str(package)]
    assert (package / "Manifest.json").stat().st_mtime_ns == written  # a bundle may lie where nobody may write
    (entry,) = (tmp_path / "cache" / "compiled").iterdir()
    assert {path for path, _ in mac.loaded} == {str(entry / "graph.mlmodelc")}


def test_a_folder_of_chunks_is_loaded_as_one_graph(mac, tmp_path):
    for number in (1, 2):
        write_package(tmp_path / "unet" / f"model_chunk{number}.mlpackage")
    assert load(tmp_path / "unet").name == str(tmp_path / "unet")
    assert [Path(source).name for source in mac.compiled] == ["model_chunk1.mlpackage", "model_chunk2.mlpackage"]
    with pytest.raises(BundleError, match="is no .mlpackage and holds no"):
        load(tmp_path)


def test_a_precision_that_the_package_was_not_built_for_is_refused(mac, package):
    built = arithmetic(described(package))
    load(package, precision=built)
    with pytest.raises(BadInput, match=f"computes in {built}, not in"):
        load(package, precision={"f32": "f16", "f16": "f32"}[built])


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"precision": "bf16"}, {"threads": 0}])
def test_settings_that_it_does_not_have_are_refused(mac, package, settings):
    with pytest.raises(BadInput, match=str(next(iter(settings.values())))):
        load(package, **settings)


def test_an_intel_mac_has_no_neural_engine(mac, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert devices() == ("all", "cpu", "gpu")


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda path: next(path.rglob("*.mlmodel")).unlink(),
                                    lambda path: next(path.rglob("*.mlmodel")).write_bytes(b"\xff" * 40)])
def test_a_damaged_package_is_refused_in_one_line_that_names_it(mac, package, damage):
    damage(package)
    with pytest.raises(BundleError) as caught:
        load(package)
    assert str(package) in str(caught.value) and "\n" not in str(caught.value)


def test_a_mac_without_coremltools_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", None)  # makes the import fail
    with pytest.raises(MissingExtra, match=r"backend coreml needs coremltools: pip install 'caphuman-edge\[coreml\]'"):
        devices()


@pytest.mark.skipif(ON_MAC, reason="this is a Mac")
def test_elsewhere_it_refuses_with_the_remedy(tmp_path):
    with pytest.raises(BadInput, match="backend coreml runs on macOS alone, this is .*; choose ort or openvino"):
        open_backend("coreml").load(tmp_path / "text.mlpackage")


@pytest.mark.skipif(not ON_MAC, reason="Core ML runs on macOS alone")
@pytest.mark.parametrize("device", ["cpu", "gpu", "all"])
def test_core_ml_computes_the_program(package, device):
    for _ in ("compiled", "from the cache"):
        outputs = open_backend("coreml").load(package, device=device)(inputs())
        np.testing.assert_allclose(outputs["tokens"][0, :, 0], np.arange(77) * 0.5, rtol=1e-3)
        assert outputs["total"].shape == (1,)
