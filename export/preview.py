"""The preview decoder: the colours of a latent cell as a linear guess, fitted to an autoencoder."""
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from caphuman_edge.export.graphs import PreviewDecoder
from caphuman_edge.ref.autoencoder import Autoencoder

PICTURES, PICTURE_SIZE, SEED = 6, 256, 5  # px


def fit_preview(latents: Float[Tensor, "n c h w"], colours: Float[Tensor, "n 3 h w"]) -> PreviewDecoder:
    """Least-squares colours, about [-1, 1], of scaled latents."""
    cells = latents.permute(0, 2, 3, 1).flatten(0, 2)
    inputs = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, colours.permute(0, 2, 3, 1).flatten(0, 2)).solution.T  # (3, channels + 1)
    return PreviewDecoder(solution[:, :-1, None, None].contiguous(), solution[:, -1].contiguous())


def preview_of(autoencoder: Autoencoder) -> PreviewDecoder:
    """Fitted to what the autoencoder makes of soft colour fields: no photos are at hand when a bundle is built."""
    pictures = _colour_fields()
    with torch.no_grad():
        latents = torch.cat([autoencoder.encode(picture[None]) for picture in pictures])
    return fit_preview(latents, F.avg_pool2d(pictures, autoencoder.config.downscale))


def _colour_fields() -> Float[Tensor, "n 3 s s"]:
    """Smooth random colours with a little grain, [-1, 1]."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.rand((PICTURES, 3, 6, 6), generator=generator) * 2.4 - 1.2
    smooth = F.interpolate(coarse, size=(PICTURE_SIZE, PICTURE_SIZE), mode="bicubic", align_corners=False)
    grain = torch.randn(smooth.shape, generator=generator) * 0.03
    return (smooth + grain).clamp(-1, 1)
