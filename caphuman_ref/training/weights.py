"""Reading back what a training run wrote: EMA weights in float16 and the config they belong to."""
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.checkpoints import load_strictly, prefixed, read_checkpoint
from caphuman_edge.runtime.contract import Config, VaeConfig

WEIGHTS = "weights.safetensors"


def load_vae(folder: Path) -> Autoencoder:
    """The autoencoder of a `training.vae` run, in float32, without gradients."""
    model = Autoencoder(VaeConfig.from_json(metadata(folder)["vae"]))
    weights = read_checkpoint(folder / WEIGHTS)
    load_strictly(model, {name: tensor.float() for name, tensor in weights.items()}, str(folder / WEIGHTS))
    return model.eval().requires_grad_(False)


def load_nano(folder: Path, vae_folder: Path) -> CapHuman:
    """The miniature of a `training.nano` run with its autoencoder, in float32, without gradients.

    The latent scale is that of the labels it was trained on.
    """
    model = CapHuman(Config.from_json(metadata(folder)["config"]))
    weights = read_checkpoint(folder / WEIGHTS) | prefixed(read_checkpoint(vae_folder / WEIGHTS), "first_stage_model.")
    load_strictly(model, {name: tensor.float() for name, tensor in weights.items()}, f"{folder} and {vae_folder}")
    return model.eval().requires_grad_(False)


def metadata(folder: Path) -> dict[str, Any]:
    """Config, step and samples seen."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}
