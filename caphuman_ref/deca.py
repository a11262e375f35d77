"""DECA's coarse encoder (Feng et al. 2021, arXiv 2012.04012): a face crop to the parameters of its head.

Parameter names equal those of `E_flame` in deca_model.tar.
"""
from jaxtyping import Float
from torch import Tensor, nn

from caphuman_edge.ref.resnet import Bottleneck, ResNet

PART = "E_flame"  # the file also holds E_detail and D_detail: wrinkles, which no control map of CapHuman shows
PARAMETERS = {"shape": 100, "texture": 50, "expression": 50, "pose": 6, "camera": 3, "light": 27}  # in this order


class HeadEncoder(nn.Module):
    """An RGB crop of 224 px, 0..1 and not normalised, to 236 parameters.

    Pose is global rotation and jaw, axis-angle in radians; camera is scale and shift; light is nine rows of RGB.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet(Bottleneck, (3, 4, 6, 3))
        self.layers = nn.Sequential(nn.Linear(2048, 1024), nn.ReLU(), nn.Linear(1024, sum(PARAMETERS.values())))

    def forward(self, image: Float[Tensor, "b 3 224 224"]) -> Float[Tensor, "b 236"]:
        return self.layers(self.encoder(image)[-1].mean(dim=(2, 3)))
