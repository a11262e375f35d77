"""Build the embedded miniature's bundle from trained weights.

    python -m caphuman_edge.export.nano --weights RUN --vae RUN --labels DIR --perception DIR --out runtime/data/nano
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from caphuman_edge.export.builder import Sources, build
from caphuman_edge.export.graphs import PreviewDecoder
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.training.weights import load_nano, read_metadata, weight_files
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.schedule import Schedule

GUIDANCE = 3.0
STEPS = 20
LICENCE_TEXT = """\
The weights of this bundle's text_encoder, image_encoder, hint_encoder, denoiser, capface, unet, vae_decoder and
preview_decoder are licensed for non-commercial research use only. They were trained by the CapHuman Edge authors on
pictures of people who do not exist, made with a face generator (MobileStyleGAN, whose author licenses it under
Apache-2.0) that was distilled from StyleGAN2, trained on FFHQ, whose terms are non-commercial.
They come without warranty of any kind. Do not use them to deceive, or to depict a person without that person's consent.

face_detector, face_landmarks and face_blendshapes are MediaPipe's (Apache-2.0), id_encoder is SFace of the OpenCV model
zoo (Apache-2.0), head is derived from MakeHuman data (CC0 1.0), tokenizer is CLIP's vocabulary (MIT): see NOTICE.
"""
LICENCES = {
    "trained weights": "research use only: the training pictures' generator descends from non-commercial data",
    "face_detector, face_landmarks, face_blendshapes": "Apache-2.0, Google (face_landmarker)",
    "id_encoder": "Apache-2.0, OpenCV Zoo (SFace)",
    "head": "CC0-1.0, from MakeHuman data",
    "tokenizer": "MIT, OpenAI (CLIP vocabulary)",
}


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of a training.nano run")
    parser.add_argument("--vae", type=Path, required=True, help="folder of a training.vae run")
    parser.add_argument("--labels", type=Path, required=True, help="label folder, for the preview decoder")
    parser.add_argument("--perception", type=Path, required=True, help="folder written by export.perception")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = load_nano(options.weights, options.vae)
    facts = read_metadata(options.weights)
    folders = {"model": options.weights, "vae": options.vae}
    hashes = {f"{part}/{path.name}": digest for part, folder in folders.items()
              for path, digest in sha256_of(weight_files(folder)).items()}
    provenance = {"samples_seen": facts["samples"], "training_steps": facts["step"], "sha256": hashes}
    sources = Sources(options.perception, "nano", Schedule(steps=STEPS, guidance=GUIDANCE), provenance, LICENCES,
                      LICENCE_TEXT)
    build(model, fit_preview(model, options.labels), sources, options.out, lambda line: print(line, file=sys.stderr))
    return 0


def fit_preview(model: CapHuman, labels: Path) -> PreviewDecoder:
    """Least-squares colours of a latent cell, over latents of the labels and what the autoencoder makes of them."""
    cell = model.config.vae.downscale
    with np.load(labels / f"latents-{model.config.height}.npz") as stored:
        latents = torch.from_numpy(stored["latents"][::100, 0].astype(np.float32) * stored["step"])
    with torch.no_grad():
        colours = torch.cat([F.avg_pool2d(model.first_stage_model.decode(latents[first:first + 8]), cell)
                             for first in range(0, len(latents), 8)])
    cells = latents.permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution.T  # (3, channels + 1)
    return PreviewDecoder(solution[:, :-1, None, None].contiguous(), solution[:, -1].contiguous())


if __name__ == "__main__":
    sys.exit(guarded(main))
