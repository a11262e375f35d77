"""The face parser, BiSeNet (Yu et al. 2018, arXiv 1808.00897): which of 19 parts of a portrait a pixel shows.

Parameter names equal those of 79999_iter.pth, trained on CelebAMask-HQ.
"""
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from caphuman_edge.ref.resnet import BasicBlock, ResNet

CLASSES = 19
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, RGB in 0..1
IMAGE_STD = (0.229, 0.224, 0.225)


class FaceParser(nn.Module):
    """A normalised image of at least 32 px to logits at its own size.

    The two auxiliary heads are training's: they are in every checkpoint and not computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion()
        self.conv_out = Head(256, 256)
        self.conv_out16, self.conv_out32 = Head(128, 64), Head(128, 64)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 19 H W"]:
        logits = self.conv_out(self.ffm(*self.cp(image)))
        return F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=True)


class ContextPath(nn.Module):
    """Features at an eighth of the image: plain ones, and ones that know the whole picture."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet(BasicBlock, (2, 2, 2, 2))
        self.arm16, self.arm32 = AttentionRefinement(256), AttentionRefinement(512)
        self.conv_head32, self.conv_head16 = ConvNormRelu(128, 128, 3), ConvNormRelu(128, 128, 3)
        self.conv_avg = ConvNormRelu(512, 128, 1)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> tuple[Float[Tensor, "b 128 h w"], Float[Tensor, "b 128 h w"]]:
        eighth, sixteenth, last = self.resnet(image)
        coarse = self.arm32(last) + self.conv_avg(_mean(last))
        middle = self.conv_head32(F.interpolate(coarse, sixteenth.shape[2:], mode="nearest"))
        fine = F.interpolate(self.arm16(sixteenth) + middle, eighth.shape[2:], mode="nearest")
        return eighth, self.conv_head16(fine)


class AttentionRefinement(nn.Module):
    """A convolution whose channels are weighed by their mean over the picture."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = ConvNormRelu(channels, 128, 3)
        self.conv_atten = nn.Conv2d(128, 128, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(128)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 128 h w"]:
        features = self.conv(x)
        return features * torch.sigmoid(self.bn_atten(self.conv_atten(_mean(features))))


class FeatureFusion(nn.Module):
    """Both features as one; channels are amplified by their mean over the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.convblk = ConvNormRelu(256, 256, 1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, plain: Float[Tensor, "b 128 h w"], context: Float[Tensor, "b 128 h w"]
                ) -> Float[Tensor, "b 256 h w"]:
        features = self.convblk(torch.cat([plain, context], dim=1))
        return features * (1 + torch.sigmoid(self.conv2(F.relu(self.conv1(_mean(features))))))


class Head(nn.Module):
    """Logits of the classes."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = ConvNormRelu(channels, width, 3)
        self.conv_out = nn.Conv2d(width, CLASSES, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 19 h w"]:
        return self.conv_out(self.conv(x))


class ConvNormRelu(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.bn(self.conv(x)))


def normalise(image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """RGB in 0..1 as the parser was trained on it."""
    return (image - image.new_tensor(IMAGE_MEAN)[:, None, None]) / image.new_tensor(IMAGE_STD)[:, None, None]


def _mean(features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 1 1"]:
    return features.mean(dim=(2, 3), keepdim=True)
