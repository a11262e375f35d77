"""Which of a head's numbers come from which photo: the official control modes."""
from dataclasses import replace

import numpy as np

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.head.code import HeadCode

MODES = ("position", "pose", "lighting", "expression")
EVERYTHING = "all"
DEFAULT_MODES = "position,pose"


def mix(reference: HeadCode, target: HeadCode, modes: str = DEFAULT_MODES) -> HeadCode:
    """The reference person with what `modes` names taken from the target.

    position: camera and crop; pose: the head's rotation; lighting: light; expression: expression and jaw; "all": all
    four. Words stand between commas; identity and texture always stay. As in the official tool, "all" means anything
    only alone: in "position,all" it is ignored. That tool looks for the four words anywhere in the string and ignores
    the rest, so every string that is accepted here means the same there; others (a misspelt word, another separator)
    raise BadInput here.
    """
    chosen = _parse(modes)
    code = reference
    if "position" in chosen:
        code = replace(code, camera=target.camera, crop=target.crop)
    if "pose" in chosen:
        code = replace(code, pose=np.concatenate([target.pose[:3], code.pose[3:]]))
    if "lighting" in chosen:
        code = replace(code, light=target.light)
    if "expression" in chosen:
        pose = np.concatenate([code.pose[:3], target.pose[3:]])
        code = replace(code, expression=target.expression, pose=pose)
    return code


def _parse(modes: str) -> set[str]:
    words = {word.strip() for word in modes.split(",")} - {""}
    unknown = words - {*MODES, EVERYTHING}
    if unknown:
        raise BadInput(f'control mode "{min(unknown)}" is not known, expected some of {", ".join(MODES)}, or all')
    return set(MODES) if modes == EVERYTHING else words
