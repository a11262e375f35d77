"""The contract's sizes: those of official SD-1.5 CapHuman at full size, consistent at every size."""
import json

import pytest

from caphuman_edge.runtime.contract import FULL, NANO, RESIDUALS, TINY, Config, graphs, residual_shapes

CONFIGS = {"full": FULL, "tiny": TINY, "nano": NANO}


def shape(config: Config, graph: str, tensor: str) -> tuple[int | str, ...]:
    spec = graphs(config)[graph]
    return next(t.shape for t in (*spec.inputs, *spec.outputs) if t.name == tensor)


def test_the_full_size_is_the_official_one():
    assert FULL.latent_shape == (4, 64, 64)
    assert FULL.face_tokens == 258
    assert shape(FULL, "hint_encoder", "maps") == (1, 9, 512, 512)
    assert shape(FULL, "denoiser", "face_tokens") == (1, 258, 768)
    assert shape(FULL, "id_encoder", "identity") == (1, 512)


def test_the_thirteen_residuals_have_the_official_channels_and_sizes():
    assert residual_shapes(FULL) == [
        *[(320, 64, 64)] * 3, (320, 32, 32), *[(640, 32, 32)] * 2, (640, 16, 16), *[(1280, 16, 16)] * 2, (1280, 8, 8),
        *[(1280, 8, 8)] * 3,
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_survives_json(config):
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_one_graph_feeds_the_next(config):
    assert shape(config, "image_encoder", "last_hidden_state") == shape(config, "hint_encoder", "image_tokens")
    assert shape(config, "id_encoder", "identity") == shape(config, "hint_encoder", "identity")
    assert shape(config, "text_encoder", "last_hidden_state")[2] == shape(config, "denoiser", "text_tokens")[2]
    assert shape(config, "denoiser", "eps")[1:] == shape(config, "vae_decoder", "latent_sample")[1:]
    for tensor in ("hint", "face_tokens", *(f"gate_{level}" for level in range(4))):
        assert shape(config, "hint_encoder", tensor) == shape(config, "denoiser", tensor)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_split_denoiser_passes_thirteen_residuals_on(config):
    capface, unet = graphs(config)["capface"], graphs(config)["unet"]
    residuals = [tensor for tensor in unet.inputs if tensor.name.startswith("residual_")]
    assert len(residuals) == RESIDUALS and residuals == list(capface.outputs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_graph_has_tensors_of_distinct_names(config):
    for spec in graphs(config).values():
        names = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        assert spec.inputs and spec.outputs and len(set(names)) == len(names)


@pytest.mark.parametrize("part", [None, "unet", "text", "vision", "vae"])
def test_unknown_fields_are_refused(part):
    data = FULL.to_json()
    (data[part] if part else data)["depth"] = 3
    with pytest.raises(TypeError, match="depth"):
        Config.from_json(data)
