"""Build the embedded miniature's bundle from trained weights.

    python -m caphuman_edge.export.nano --weights RUN --vae RUN --labels DIR --perception DIR --out runtime/data/nano
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.builder import Sources, build
from caphuman_edge.export.graphs import PreviewDecoder
from caphuman_edge.export.preview import fit_preview
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.training.weights import load_nano, read_metadata, weight_files
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.schedule import Schedule

GUIDANCE = IDENTITY_GUIDANCE = 3.0  # equal, so that the latter costs little; see runtime.denoise
STEPS = 20
LICENCE_TEXT = """\
The weights of this bundle's text_encoder, image_encoder, hint_encoder, denoiser, capface, unet, vae_encoder,
vae_decoder and preview_decoder are licensed for non-commercial research use only. They were trained by the CapHuman
Edge authors on pictures of people who do not exist, made with a face generator (MobileStyleGAN, whose author licenses
it under Apache-2.0) that was distilled from StyleGAN2, trained on FFHQ, whose terms are non-commercial.
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
    schedule = Schedule(steps=STEPS, guidance=GUIDANCE, identity_guidance=IDENTITY_GUIDANCE)
    sources = Sources(perception_in(options.perception), "nano", schedule, provenance, LICENCES, LICENCE_TEXT)
    build(model, preview_from(model, options.labels), sources, options.out,
          report=lambda line: print(line, file=sys.stderr))
    return 0


def preview_from(model: CapHuman, labels: Path) -> PreviewDecoder:
    """Fitted to latents of the labels and what the autoencoder makes of them."""
    with np.load(labels / f"latents-{model.config.height}.npz") as stored:
        latents = torch.from_numpy(stored["latents"][::100, 0].astype(np.float32) * stored["step"])
    with torch.no_grad():
        colours = torch.cat([F.avg_pool2d(model.first_stage_model.decode(latents[first:first + 8]),
                                          model.config.vae.downscale) for first in range(0, len(latents), 8)])
    return fit_preview(latents, colours)


if __name__ == "__main__":
    sys.exit(guarded(main))
