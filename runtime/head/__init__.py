"""The head: a FLAME-format model, codes that say how it looks and stands, and the fit of a code to a photo."""
from .code import HeadCode, HeadLayout, project
from .controls import DEFAULT_MODES, MODES, mix
from .deca import DecaEncoder, is_flame
from .fit import HeadFitter
from .light import directional_light
from .model import HeadModel
from .storage import OPEN_HEAD, head_from_arrays, load_head

__all__ = ["DEFAULT_MODES", "MODES", "OPEN_HEAD", "DecaEncoder", "HeadCode", "HeadFitter", "HeadLayout", "HeadModel",
           "directional_light", "head_from_arrays", "is_flame", "load_head", "mix", "project"]
