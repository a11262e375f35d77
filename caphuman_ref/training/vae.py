"""Train the miniature's autoencoder on a folder of pictures.

    python -m caphuman_edge.ref.training.vae --pictures DIR --out DIR --minutes 30
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.ref.autoencoder import Autoencoder
from caphuman_edge.ref.training.run import Plan, Run, guarded, mixed_precision
from caphuman_edge.runtime.contract import HELD_OUT_SEEDS, NANO

KL_WEIGHT = 1e-4
SHARPNESS_WEIGHT = 1.0
REPAINTED = 0.5  # share of crops in other colours: the pictures hold few saturated ones, prompts name them
MOST_SATURATION = 2.5  # of the crop's own
GREY = (0.299, 0.587, 0.114)  # luminance of RGB (ITU-R BT.601)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of NNNNN*.jpg, 256 px")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--decay-steps", type=int, default=12_000, help="steps over which the rate falls to a tenth")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--crop", type=int, default=128, help="px; the decoder is convolutional but for its middle")
    parser.add_argument("--start-from", type=Path, help="folder of another run's weights, for a fresh start")
    options = parser.parse_args()
    plan = Plan(minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
                decay_steps=options.decay_steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)
    model = Autoencoder(NANO.vae).to(device, memory_format=torch.channels_last)
    run = Run(options.out, model, plan, {"vae": NANO.to_json()["vae"]})
    if options.start_from:
        run.start_from(options.start_from)
    pictures = read_pictures(options.pictures)
    rng = np.random.default_rng(plan.seed + run.step)
    run.train(lambda step: losses(
        model, repainted(random_crops(pictures, plan.batch, options.crop, rng), rng).to(device)))


def read_pictures(folder: Path) -> np.ndarray:
    """All pictures that may be trained on, (n, 256, 256, 3) uint8, mirrored copies not included."""
    paths = sorted(path for path in folder.glob("*.jpg") if int(path.name[:5]) >= HELD_OUT_SEEDS)
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def random_crops(pictures: np.ndarray, batch: int, edge: int, rng: np.random.Generator) -> Tensor:
    """Random mirrored crops in [-1, 1], (batch, 3, edge, edge) channels last."""
    crops = np.empty((batch, edge, edge, 3), np.uint8)
    for crop, index in zip(crops, rng.integers(len(pictures), size=batch), strict=True):
        top, left = rng.integers(pictures.shape[1] - edge + 1, size=2)
        crop[:] = pictures[index, top:top + edge, left:left + edge, :][:, ::rng.choice([-1, 1])]
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def repainted(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Some of the crops in other hues and saturations, in place: chroma turned and stretched about the grey axis."""
    grey = torch.tensor(GREY).view(3, 1, 1)
    for image in (image for image in images if rng.random() < REPAINTED):  # rows of a batch are views
        angle, stretch = rng.uniform(-np.pi, np.pi), rng.uniform(0, MOST_SATURATION)
        luminance = (image * grey).sum(dim=0, keepdim=True)
        chroma = torch.einsum("ij,jhw->ihw", _turn_about_grey(angle), image - luminance)
        image.copy_((luminance + stretch * chroma).clamp(-1, 1))
    return images


def _turn_about_grey(angle: float) -> Tensor:
    """A rotation of RGB about (1, 1, 1), by Rodrigues' formula."""
    axis = np.full(3, 3**-0.5)
    cross = np.cross(np.eye(3), axis)
    return torch.tensor(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross, dtype=torch.float32)


def losses(model: Autoencoder, image: Tensor) -> dict[str, Tensor]:
    """L1 on pixels and on image gradients at three scales, with a weak pull to a normal latent."""
    with mixed_precision(image.device):
        mean, logvar = model.moments(image)
        latent = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        decoded = model.decode(latent * model.config.latent_scale)
    decoded, mean, logvar = decoded.float(), mean.float(), logvar.float()
    pixel = F.l1_loss(decoded, image)
    sharpness = gradient_distance(decoded, image)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    loss = pixel + SHARPNESS_WEIGHT * sharpness + KL_WEIGHT * kl
    psnr = -10 * torch.log10(F.mse_loss(decoded, image) / 4)
    return {"loss": loss, "pixel": pixel, "sharpness": sharpness, "kl": kl, "psnr": psnr, "std": mean.std()}


def gradient_distance(image: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute difference of forward differences, summed over halved scales: blur costs, shifts do not."""
    total = image.new_zeros(())
    for _ in range(scales):
        error = image - target
        total = total + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        image, target = F.avg_pool2d(image, 2), F.avg_pool2d(target, 2)
    return total


if __name__ == "__main__":
    guarded(main)
