"""A training's weights on disk: EMA weights in float16, in shards, with what they are as metadata."""
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import load_strictly, prefixed, read_checkpoint
from caphuman_edge.ref.tiny_decoder import TinyDecoder
from caphuman_edge.runtime.contract import NANO, Config, VaeConfig
from caphuman_edge.runtime.errors import CheckpointError

SHARD_BYTES = 15_000_000  # so that a run can come back from machines that return small files only


def load_vae(folder: Path, config: VaeConfig | None = None) -> Autoencoder:
    """The autoencoder of a `training.vae` run, in float32, without gradients.

    `config`: with the latent scale that was measured since, as labels have it; None for the run's own.
    """
    model = Autoencoder(config or VaeConfig.from_json(read_metadata(folder)["vae"]))
    load_strictly(model, read_weights(folder), str(folder))
    return model.eval().requires_grad_(False)


def load_tiny(folder: Path, config: Config) -> TinyDecoder:
    """The fast decoder of a `training.tiny` run, in float32, without gradients."""
    model = TinyDecoder(config)
    load_strictly(model, read_weights(folder), str(folder))
    return model.eval().requires_grad_(False)


def load_nano(folder: Path, vae_folder: Path, key_pooling: int = 1, decoder_tile: int = 0) -> CapHuman:
    """The miniature of a `training.nano` run with its autoencoder, in float32, without gradients.

    The latent scale is that of the labels it was trained on. `key_pooling` as in UNetConfig, `decoder_tile` as in
    Config.
    """
    config = Config.from_json(read_metadata(folder)["config"])
    # weights of before these fields lack them; every miniature reads identities from the same network
    config = dataclasses.replace(config, identity_size=NANO.identity_size, tiny_channels=NANO.tiny_channels,
                                 decoder_tile=decoder_tile,
                                 unet=dataclasses.replace(config.unet, key_pooling=key_pooling))
    model = CapHuman(config)
    weights = read_weights(folder) | prefixed(read_weights(vae_folder), "first_stage_model.")
    load_strictly(model, weights, f"{folder} and {vae_folder}")
    return model.eval().requires_grad_(False)


def write_weights(folder: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the weights as float16 shards, each whole or not at all; every shard carries the metadata."""
    facts = {name: json.dumps(value) for name, value in metadata.items()}
    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in weights.items()}
    shards = list(_shards(halves))
    for number, shard in enumerate(shards, start=1):
        path = folder / f"weights-{number}-of-{len(shards)}.safetensors"
        write_whole(path, lambda part, shard=shard: save_file(shard, part, facts))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All shards' tensors in float32. Raises CheckpointError where they come from different moments of a run."""
    if len({json.dumps(_metadata(path), sort_keys=True) for path in weight_files(folder)}) > 1:
        raise CheckpointError(f"{folder} holds shards of different training steps; copy all of one step")
    tensors = {name: tensor for path in weight_files(folder) for name, tensor in read_checkpoint(path).items()}
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def read_metadata(folder: Path) -> dict[str, Any]:
    """Config, step and samples seen."""
    return _metadata(weight_files(folder)[0])


def weight_files(folder: Path) -> list[Path]:
    """The shards in order. Raises CheckpointError where there are none, or not all."""
    paths = sorted(folder.glob("weights-*-of-*.safetensors"))
    if not paths or len(paths) != int(paths[0].stem.split("-")[-1]):
        raise CheckpointError(f"{folder} holds {len(paths)} weight shards, expected all of weights-*-of-N.safetensors")
    return paths


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, then move it there."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def _shards(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors in order, cut before a shard would grow too large."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
