"""Reading FaceNet's weights out of a .tflite, on a small file of the same form."""
import numpy as np
import pytest
import torch

flatbuffers = pytest.importorskip("flatbuffers")

from caphuman_edge.export.facenet_tflite import read_facenet, read_layers  # noqa: E402
from caphuman_edge.runtime.errors import CheckpointError  # noqa: E402

FLOAT, INT8 = 0, 9  # tensor types
CONVOLUTION, ADD = 3, 0  # operators


class Writer:
    """Writes tables as tensorflow/lite/schema/schema.fbs numbers their fields."""

    def __init__(self):
        self.builder = flatbuffers.Builder()

    def table(self, **fields):
        """`i0=3` is an int32 in field 0, `b` an int8, `o` an offset; returns the table's own offset."""
        self.builder.StartObject(12)
        for key, value in fields.items():
            slot, kind = int(key[1:]), key[0]
            add = {"i": self.builder.PrependInt32Slot, "b": self.builder.PrependInt8Slot,
                   "o": self.builder.PrependUOffsetTRelativeSlot}[kind]
            add(slot, value, 0)
        return self.builder.EndObject()

    def numbers(self, values):
        return self.builder.CreateNumpyVector(np.asarray(values))

    def tables(self, offsets):
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()


def tflite(weight, scale, bias):
    """A model of an addition and one convolution, whose int8 weights have a scale for each output."""
    w = Writer()
    contents = np.zeros(0, np.uint8), weight.view(np.uint8).ravel(), bias.view(np.uint8)
    buffers = w.tables([w.table(o0=w.numbers(content)) for content in contents])
    quantisation = w.table(o2=w.numbers(scale))
    tensors = w.tables([
        w.table(o0=w.numbers(np.int32([1, 9, 9, 2])), b1=FLOAT, i2=0),
        w.table(o0=w.numbers(np.int32(weight.shape)), b1=INT8, i2=1, o4=quantisation),
        w.table(o0=w.numbers(np.int32(bias.shape)), b1=FLOAT, i2=2)])
    operators = w.tables([w.table(i0=1, o1=w.numbers(np.int32([0, 0]))),
                          w.table(i0=0, o1=w.numbers(np.int32([0, 1, 2])))])
    codes = w.tables([w.table(i3=CONVOLUTION), w.table(i3=ADD)])
    graph = w.tables([w.table(o0=tensors, o3=operators)])
    w.builder.Finish(w.table(i0=3, o1=codes, o2=graph, o4=buffers))
    return bytes(w.builder.Output())


@pytest.fixture
def content():
    weight = np.arange(-27, 27, dtype=np.int8).reshape(3, 3, 3, 2)  # out, rows, columns, in
    return tflite(weight, np.float32([0.5, 1, 2]), np.float32([7, 8, 9]))


def test_int8_weights_are_multiplied_out_by_output_and_channels_come_first(content):
    [(weight, bias)] = read_layers(content)
    assert weight.shape == (3, 2, 3, 3) and weight.dtype == np.float32
    assert weight[0, 0, 0, 0] == -27 * 0.5 and weight[0, 1, 0, 0] == -26 * 0.5 and weight[2, 1, 2, 2] == 26 * 2
    assert bias.tolist() == [7, 8, 9]


def test_another_network_is_refused(content, tmp_path):
    (tmp_path / "other.tflite").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.tflite has 1 layers with weights, expected 133"):
        read_facenet(tmp_path / "other.tflite")


@pytest.mark.parametrize("damaged", [b"", b"<html>Not found</html>", "cut"])
def test_a_damaged_file_is_one_clear_error(content, tmp_path, damaged):
    (tmp_path / "a.tflite").write_bytes(content[:len(content) // 2] if damaged == "cut" else damaged)
    with pytest.raises(CheckpointError, match=r"a\.tflite cannot be read as a \.tflite"):
        read_facenet(tmp_path / "a.tflite")


@pytest.mark.parametrize(("scale", "bias"), [(np.ones(2), np.ones(3)), (np.ones(10**6), np.ones(3)),
                                             (np.ones(3), np.ones(4))])
def test_scales_and_biases_for_other_weights_are_refused(tmp_path, scale, bias):
    weight = np.zeros((3, 3, 3, 2), np.int8)
    (tmp_path / "a.tflite").write_bytes(tflite(weight, np.float32(scale), np.float32(bias)))
    with pytest.raises(CheckpointError, match=r"scales for weights|with a bias"):
        read_facenet(tmp_path / "a.tflite")


def test_folded_norms_and_scales_are_undone_in_the_official_architecture(monkeypatch, tmp_path):
    """A network whose layers are folded as the converter folds them computes the same after it is read."""
    from caphuman_edge.export import facenet_tflite
    from caphuman_edge.ref.identity import FaceNet

    torch.manual_seed(0)
    network = FaceNet().eval().requires_grad_(False)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.copy_(0.7 + 0.6 * torch.rand_like(buffer))
    monkeypatch.setattr(facenet_tflite, "read_layers", lambda content: folded(network))
    (tmp_path / "a.tflite").write_bytes(b"")
    face = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(read_facenet(tmp_path / "a.tflite").features(face), network.features(face),
                               atol=1e-4, rtol=1e-4)


def folded(network):
    """(weight, bias) of each layer, norms and block scales multiplied in."""
    modules = dict(network.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            parent = modules[name.rpartition(".")[0]]
            norm = network.last_bn if name == "last_linear" else getattr(parent, "bn", None)
            if norm is None:
                yield (module.weight * parent.scale).numpy(), (module.bias * parent.scale).numpy()
            else:
                gain = norm.weight / (norm.running_var + norm.eps).sqrt()
                shaped = gain.reshape(-1, *[1] * (module.weight.ndim - 1))
                yield (module.weight * shaped).numpy(), (norm.bias - norm.running_mean * gain).numpy()
