"""The identity encoder: FaceNet's Inception-ResNet-v1 (Szegedy et al. 2016, arXiv 1602.07261), trained on VGGFace2.

Parameter names equal those of 20180402-114759-vggface2.pt.
"""
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-3
CLASSIFIER = "logits."  # names of the 8,631 people it was trained on; not part of the encoder
SCALES = {"repeat_1": 0.17, "repeat_2": 0.10, "repeat_3": 0.20}  # of a residual, by stage; 1 in the last block


class FaceNet(nn.Module):
    """A face of 160 px, (RGB - 127.5) / 128, to its identity, a vector of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d_1a, self.conv2d_2a = Conv(3, 32, 3, stride=2), Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.conv2d_3b, self.conv2d_4a = Conv(64, 80, 1), Conv(80, 192, 3)
        self.conv2d_4b = Conv(192, 256, 3, stride=2)
        self.repeat_1 = nn.Sequential(*(_block_a(SCALES["repeat_1"]) for _ in range(5)))
        self.mixed_6a = Reduction(Conv(256, 384, 3, stride=2),
                                  nn.Sequential(Conv(256, 192, 1), Conv(192, 192, 3, padding=1),
                                                Conv(192, 256, 3, stride=2)))
        self.repeat_2 = nn.Sequential(*(_block_b(SCALES["repeat_2"]) for _ in range(10)))
        self.mixed_7a = Reduction(nn.Sequential(Conv(896, 256, 1), Conv(256, 384, 3, stride=2)),
                                  nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, stride=2)),
                                  nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, padding=1),
                                                Conv(256, 256, 3, stride=2)))
        self.repeat_3 = nn.Sequential(*(_block_c(SCALES["repeat_3"]) for _ in range(5)))
        self.block8 = _block_c(1.0, activate=False)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=NORM_EPS)

    def forward(self, face: Float[Tensor, "b 3 160 160"]) -> Float[Tensor, "b 512"]:
        return F.normalize(self.features(face))

    def features(self, face: Float[Tensor, "b 3 160 160"]) -> Float[Tensor, "b 512"]:
        """The identity before it is brought to unit length."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(face)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(F.max_pool2d(x, 3, stride=2))))
        x = self.mixed_7a(self.repeat_2(self.mixed_6a(self.repeat_1(x))))
        x = self.block8(self.repeat_3(x))
        return self.last_bn(self.last_linear(x.mean(dim=(2, 3))))


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        return F.relu(self.bn(self.conv(x)))


class Residual(nn.Module):
    """Branches of one width side by side, mixed, scaled and added to what came in."""

    def __init__(self, channels: int, width: int, scale: float, branches: tuple[nn.Module, ...], activate: bool = True):
        super().__init__()
        self.scale, self.activate, self.count = scale, activate, len(branches)
        for k, branch in enumerate(branches):
            setattr(self, f"branch{k}", branch)
        self.conv2d = nn.Conv2d(len(branches) * width, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        mixed = self.conv2d(torch.cat([getattr(self, f"branch{k}")(x) for k in range(self.count)], dim=1))
        total = x + self.scale * mixed
        return F.relu(total) if self.activate else total


class Reduction(nn.Module):
    """Branches and a maximum pool side by side, each halving the size."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.count = len(branches)
        for k, branch in enumerate(branches):
            setattr(self, f"branch{k}", branch)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        branches = [getattr(self, f"branch{k}")(x) for k in range(self.count)]
        return torch.cat([*branches, F.max_pool2d(x, 3, stride=2)], dim=1)


def _block_a(scale: float) -> Residual:
    return Residual(256, 32, scale, (
        Conv(256, 32, 1),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1), Conv(32, 32, 3, padding=1))))


def _block_b(scale: float) -> Residual:
    return Residual(896, 128, scale, (
        Conv(896, 128, 1),
        nn.Sequential(Conv(896, 128, 1), Conv(128, 128, (1, 7), padding=(0, 3)),
                      Conv(128, 128, (7, 1), padding=(3, 0)))))


def _block_c(scale: float, activate: bool = True) -> Residual:
    return Residual(1792, 192, scale, (
        Conv(1792, 192, 1),
        nn.Sequential(Conv(1792, 192, 1), Conv(192, 192, (1, 3), padding=(0, 1)),
                      Conv(192, 192, (3, 1), padding=(1, 0)))), activate)
