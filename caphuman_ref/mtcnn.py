"""The three networks of MTCNN (Zhang et al. 2016, arXiv 1604.02878), which find faces from coarse to fine.

Parameter names equal those of facenet-pytorch's pnet.pt, rnet.pt and onet.pt. Images are (RGB - 127.5) / 128.
Each gives a box's regression (left, top, right, bottom, relative to its size) and the probabilities of no face, face.
"""
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ProposalNet(nn.Module):
    """Any image of at least 12 px: one window of 12 px every two pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, image: Float[Tensor, "b 3 H W"]) -> tuple[Float[Tensor, "b 4 h w"], Float[Tensor, "b 2 h w"]]:
        x = _pool(self.prelu1(self.conv1(image)), 2)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(dim=1)


class RefineNet(nn.Module):
    """Windows of 24 px."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, image: Float[Tensor, "b 3 24 24"]) -> tuple[Float[Tensor, "b 4"], Float[Tensor, "b 2"]]:
        x = _pool(self.prelu1(self.conv1(image)), 3)
        x = self.prelu3(self.conv3(_pool(self.prelu2(self.conv2(x)), 3)))
        x = self.prelu4(self.dense4(_columns_first(x)))
        return self.dense5_2(x), self.dense5_1(x).softmax(dim=1)


class OutputNet(nn.Module):
    """Windows of 48 px; also five points, five x then five y, relative to the window."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, image: Float[Tensor, "b 3 48 48"]
                ) -> tuple[Float[Tensor, "b 4"], Float[Tensor, "b 2"], Float[Tensor, "b 10"]]:
        x = _pool(self.prelu1(self.conv1(image)), 3)
        x = _pool(self.prelu2(self.conv2(x)), 3)
        x = _pool(self.prelu3(self.conv3(x)), 2)
        x = self.prelu5(self.dense5(_columns_first(self.prelu4(self.conv4(x)))))
        return self.dense6_2(x), self.dense6_1(x).softmax(dim=1), self.dense6_3(x)


def _pool(x: Tensor, kernel: int) -> Tensor:
    """The maximum of every other window; the last one may reach over the edge."""
    return F.max_pool2d(x, kernel, stride=2, ceil_mode=True)


def _columns_first(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Flattened as the original's Caffe weights want it: by column, row, channel."""
    return torch.flatten(x.permute(0, 3, 2, 1), 1)
