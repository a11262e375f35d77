"""Build the embedded miniature's bundle from trained weights.

    python -m caphuman_edge.export.nano --weights RUN --vae RUN --labels DIR --perception DIR --out runtime/data/nano
"""
import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from caphuman_edge.export.assemble import perception_in
from caphuman_edge.export.build_command import listed_formats, tile_edge
from caphuman_edge.export.builder import Sources, build
from caphuman_edge.export.graphs import PreviewDecoder
from caphuman_edge.export.preview import fit_preview
from caphuman_edge.export.stages import Options
from caphuman_edge.ref.caphuman import CapHuman
from caphuman_edge.ref.training.weights import load_nano, load_tiny, read_metadata, weight_files
from caphuman_edge.runtime.cache import sha256_of
from caphuman_edge.runtime.cli import guarded
from caphuman_edge.runtime.errors import CheckpointError
from caphuman_edge.runtime.manifest import FORMATS
from caphuman_edge.runtime.samplers import DISTILLED
from caphuman_edge.runtime.schedule import TRAILING, Schedule

# DPM-Solver++ draws in 10 steps as well as DDIM in 20, and prompts and likeness are both obeyed at this guidance: see
# "Guidance" in benchmarks/RESULTS.md.
SAMPLED = Schedule(kind="dpm++", steps=10, guidance=3.0, identity_guidance=1.0, timesteps=TRAILING)
STUDENT_STEPS = 4
LICENCE_TEXT = """\
The weights of this bundle's text_encoder, image_encoder, hint_encoder, denoiser, capface, unet, vae_encoder,
vae_decoder, tiny_decoder and preview_decoder are licensed for non-commercial research use only. They were trained by
the CapHuman Edge authors on pictures of people who do not exist, made with a face generator (MobileStyleGAN, whose
author licenses it under Apache-2.0) that was distilled from StyleGAN2, trained on FFHQ, whose terms are non-commercial.
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
    parser.add_argument("--weights", type=Path, required=True, help="folder of a training.nano or training.distill run")
    parser.add_argument("--vae", type=Path, required=True, help="folder of a training.vae run")
    parser.add_argument("--tiny", type=Path, help="folder of a training.tiny run: the fast decoder")
    parser.add_argument("--labels", type=Path, required=True, help="label folder, for the preview decoder")
    parser.add_argument("--perception", type=Path, required=True, help="folder written by export.perception")
    parser.add_argument("--format", type=listed_formats, default=("onnx",), metavar="F,..", dest="formats",
                        help=f"one or several of {', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--pool-keys", type=int, choices=(1, 2, 4), default=1, help="as in 'caphuman build'")
    parser.add_argument("--decode-tiles", type=tile_edge, default=0, metavar="EDGE", help="as in 'caphuman build'")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    facts = read_metadata(options.weights)
    schedule = schedule_of(facts, str(options.weights))
    model = load_nano(options.weights, options.vae, options.pool_keys, options.decode_tiles)
    tiny = load_tiny(options.tiny, model.config) if options.tiny else None
    folders = {"model": options.weights, "vae": options.vae, **({"tiny": options.tiny} if options.tiny else {})}
    hashes = {f"{part}/{path.name}": digest for part, folder in folders.items()
              for path, digest in sha256_of(weight_files(folder)).items()}
    provenance = {"samples_seen": facts["samples"], "training_steps": facts["step"], "sha256": hashes}
    if "distilled" in facts:
        provenance["distilled"] = facts["distilled"]
    sources = Sources(perception_in(options.perception), "nano", schedule, provenance, LICENCES, LICENCE_TEXT)
    build(model, preview_from(model, options.labels), sources, options.out,
          Options(options.formats, tiny=tiny is not None), tiny=tiny, report=lambda line: print(line, file=sys.stderr))
    return 0


def schedule_of(facts: Mapping[str, Any], source: str) -> Schedule:
    """What weights with these metadata are sampled by: a student by the sampler that it was distilled for, unguided.

    `source` names the weights in errors. Raises CheckpointError for a kind of distillation that there is not.
    """
    if "distilled" not in facts:
        return SAMPLED
    distilled = facts["distilled"]
    kind = distilled.get("kind") if isinstance(distilled, dict) else distilled
    if kind not in DISTILLED:
        raise CheckpointError(f"{source} is distilled for {kind!r:.40}, expected {' or '.join(DISTILLED)}; distil it "
                              "by training.distill")
    return Schedule(kind=kind, steps=STUDENT_STEPS, guidance=1.0, identity_guidance=1.0, timesteps=TRAILING)


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
