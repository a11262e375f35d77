"""The official perception networks as graphs: equal to the reference, at any size that a photo has."""
import json

import numpy as np
import pytest
import torch

from caphuman_edge.export import official
from caphuman_edge.export.assemble import copy_perception, perception_in, write_selftest
from caphuman_edge.export.official import GRAPHS, IdentityGraph, ParserGraph, export_graph, export_official, main
from caphuman_edge.ref.deca import HeadEncoder
from caphuman_edge.ref.identity import FaceNet
from caphuman_edge.ref.mtcnn import OutputNet, ProposalNet, RefineNet
from caphuman_edge.ref.parser import FaceParser
from caphuman_edge.runtime.backends import open_backend
from caphuman_edge.runtime.bundle import EMBEDDED
from caphuman_edge.runtime.contract import FULL, NANO, PERCEPTION_GRAPHS, graphs
from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.manifest import check_graph

BUILD = {"head_encoder": HeadEncoder, "parser": lambda: ParserGraph(FaceParser()),
         "id_encoder": lambda: IdentityGraph(FaceNet()),
         "mtcnn_pnet": ProposalNet, "mtcnn_rnet": RefineNet, "mtcnn_onet": OutputNet}
LARGE = ("head_encoder", "id_encoder")  # many layers, and no length of their own
SIZES = {"parser": [(1, 3, 32, 32), (1, 3, 33, 47), (1, 3, 150, 117)],
         "mtcnn_pnet": [(1, 3, 12, 12), (1, 3, 13, 15), (1, 3, 61, 90)],
         "mtcnn_rnet": [(1, 3, 24, 24), (5, 3, 24, 24)], "mtcnn_onet": [(1, 3, 48, 48), (5, 3, 48, 48)]}


def random(build):
    """A network with its own initial weights, and batch norms that do something."""
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if "running" in name:
            tensor.copy_(0.7 + 0.6 * torch.rand_like(tensor))
    return network


@pytest.fixture(scope="module")
def mtcnn(tmp_path_factory):
    """A folder of MTCNN's three files."""
    folder = tmp_path_factory.mktemp("mtcnn")
    for build, name in ((ProposalNet, "pnet.pt"), (RefineNet, "rnet.pt"), (OutputNet, "onet.pt")):
        torch.save(random(build).state_dict(), folder / name)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in GRAPHS])
def test_graph_computes_what_the_network_does(name, tmp_path):
    network, spec = random(BUILD[name]), graphs(FULL)[name]
    _, parity = export_graph(name, network, tmp_path)
    assert min(parity.values()) > 100
    graph = open_backend("ort").load(tmp_path / name / "model.onnx")
    check_graph(name, graph.inputs, graph.outputs, spec)
    for size in SIZES.get(name, []):
        image = np.random.default_rng(0).random(size, np.float32)
        wanted = network(torch.from_numpy(image))
        for tensor, output in zip(spec.outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(graph({"image": image})[tensor.name], output, atol=1e-4)


def test_identity_graph_takes_pixels():
    """0..255 becomes (x - 127.5) / 128 inside."""
    graph = IdentityGraph(torch.nn.Identity())
    assert graph(torch.tensor([0.0, 127.5, 255.0])).tolist() == [-0.99609375, 0, 0.99609375]


def test_parser_graph_takes_rgb_from_0_to_1():
    """ImageNet's mean becomes 0 inside, one deviation above it 1."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.stack([mean, mean + deviation], dim=1)[None, :, None]  # (1, 3, 1, 2)
    torch.testing.assert_close(ParserGraph(torch.nn.Identity())(image), torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2))


def test_the_command_writes_graphs_and_where_they_come_from(mtcnn, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--mtcnn", str(mtcnn)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet"]
    sources = json.loads((tmp_path / "sources.json").read_text())
    assert {source["graph"] for source in sources} == {"mtcnn_pnet", "mtcnn_rnet", "mtcnn_onet"}
    for source in sources:
        assert len(source["file_sha256"]) == 64 and source["licence"] == "MIT" and "package" not in source
        assert {path.name for path in (tmp_path / source["graph"]).iterdir()} == source["files"].keys()


def test_a_checkpoint_that_does_not_fit_leaves_the_former_graph(mtcnn, tmp_path):
    export_official({"mtcnn_rnet": mtcnn / "rnet.pt"}, tmp_path)
    before = (tmp_path / "mtcnn_rnet/model.onnx").read_bytes()
    with pytest.raises(CheckpointError, match=r"onet\.pt does not fit RefineNet: .*unknown \(conv4\.bias"):
        export_official({"mtcnn_rnet": mtcnn / "onet.pt"}, tmp_path)
    assert (tmp_path / "mtcnn_rnet/model.onnx").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"mtcnn_rnet", "sources.json"}


def test_a_bundle_takes_the_official_graphs_that_are_there(mtcnn, tmp_path):
    perception, bundle = tmp_path / "perception", tmp_path / "bundle"
    perception.mkdir()
    bundle.mkdir()
    for name in PERCEPTION_GRAPHS:
        (perception / name).symlink_to(EMBEDDED / name)
    export_official({"mtcnn_rnet": mtcnn / "rnet.pt"}, perception)
    components = copy_perception(bundle, perception_in(perception), graphs(NANO))
    assert components.keys() == {*PERCEPTION_GRAPHS, "mtcnn_rnet"}
    assert components["mtcnn_rnet"].forms["onnx"].files.keys() == {"mtcnn_rnet/model.onnx", "mtcnn_rnet/weights.bin"}
    write_selftest(bundle, {}.__getitem__, components, graphs(NANO))
    assert "mtcnn_rnet/out/probability" in np.load(bundle / "selftest.npz")


def test_a_missing_checkpoint_is_told_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(official.assets, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(CheckpointError, match="deca_model.tar does not exist"):
        main(["--out", str(tmp_path), "--deca", str(tmp_path / "deca_model.tar"), "--fetch"])


def test_a_damaged_list_of_sources_is_told(tmp_path):
    (tmp_path / "sources.json").write_text("[{")
    with pytest.raises(CheckpointError, match="sources.json is damaged"):
        official._read_sources(tmp_path)
