"""Graph surgery on perception networks: what a small network of ours becomes in the contract's form."""
import struct

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from caphuman_edge.export.perception_graphs import (  # noqa: E402
    Ports,
    read_canonical_face,
    sface_to_contract,
    store_half,
    to_contract,
)
from caphuman_edge.runtime.contract import GraphSpec, TensorSpec  # noqa: E402

SPEC = GraphSpec("toy", (TensorSpec("face", (1, 64)),), (TensorSpec("identity", (1, 2, 1)),))
PORTS = Ports(("data",), ("fc1",))


def toy(weight: np.ndarray, name: str = "pre_fc1_weight"):
    """data (1, 64) -> Dropout -> Gemm with weight (2, 64) -> fc1 (1, 2), and an output that nobody wants."""
    nodes = [helper.make_node("Dropout", ["data"], ["dropped"]),
             helper.make_node("Gemm", ["dropped", name], ["fc1"], transB=1),
             helper.make_node("Neg", ["data"], ["unwanted"])]
    values = [helper.make_tensor_value_info(*value) for value in
              [("data", TensorProto.FLOAT, (1, 64)), ("fc1", TensorProto.FLOAT, (1, 2)),
               ("unwanted", TensorProto.FLOAT, (1, 64))]]
    graph = helper.make_graph(nodes, "toy", values[:1], values[1:], [numpy_helper.from_array(weight, name)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def answer(model, data: np.ndarray) -> np.ndarray:
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    return session.run(["identity"], {"face": data})[0]


def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32) * np.array([[1], [100]], np.float32)


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)


def test_unwanted_outputs_are_cut_and_logits_become_probabilities(data):
    weight = weights() / 100
    model = to_contract(toy(weight), Ports(("data",), ("fc1",), logits=("fc1",)), SPEC)
    assert {node.op_type for node in model.graph.node} == {"Dropout", "Gemm", "Reshape", "Sigmoid"}
    expected = 1 / (1 + np.exp(-data @ weight.T))
    np.testing.assert_allclose(answer(model, data), expected.reshape(1, 2, 1), rtol=1e-5)


def test_a_tensor_may_already_have_the_contracts_name(data):
    model = toy(weights())
    spec = GraphSpec("toy", (TensorSpec("fc1", (1, 64)),), (TensorSpec("data", (1, 2)),))
    renamed = to_contract(model, PORTS, spec)
    assert renamed.graph.input[0].name == "fc1" and renamed.graph.output[0].name == "data"


def test_half_storage_takes_exact_weights_only(data):
    exact = weights().astype(np.float16).astype(np.float32)
    for weight, types in (exact, [TensorProto.FLOAT16]), (weights(), [TensorProto.FLOAT]):
        plain, small = to_contract(toy(weight), PORTS, SPEC), store_half(to_contract(toy(weight), PORTS, SPEC))
        assert [t.data_type for t in small.graph.initializer if t.data_type != TensorProto.INT64] == types
        np.testing.assert_array_equal(answer(small, data), answer(plain, data))


def test_dense_layer_of_the_recogniser_is_int8_with_a_scale_for_each_output(data):
    model = sface_to_contract(toy(weights()), PORTS, SPEC)
    assert TensorProto.INT8 in [tensor.data_type for tensor in model.graph.initializer]
    assert "Dropout" not in [node.op_type for node in model.graph.node]
    step = np.abs(weights()).max(axis=1) / 127
    error = np.abs(answer(model, data)[0, :, 0] - data[0] @ weights().T)
    assert np.all(error < np.linalg.norm(data) * step * np.sqrt(64) / 2)  # half a step of each weight


def test_canonical_face_is_read_from_its_protobuf():
    vertices = np.arange(10, dtype=np.float32).reshape(2, 5)  # x y z u v
    mesh = b"".join(b"\x1d" + struct.pack("<f", value) for value in vertices.ravel())
    weighted = b"\x08\x01" + b"\x15" + struct.pack("<f", 0.25)  # vertex 1
    metadata = b"\x0a" + bytes([len(mesh)]) + mesh + b"\x12" + bytes([len(weighted)]) + weighted + b"\x18\x02"
    np.testing.assert_array_equal(read_canonical_face(metadata), [[0, 1, 2, 0], [5, 6, 7, 0.25]])
