"""Safety checks of finished pictures: a hook. None is shipped; packages bring theirs through an entry point.

A check is a function of a picture (8-bit RGB) that gives None where the picture is fine, else the reason why it is not.
A package registers it by name in its pyproject.toml:

    [project.entry-points."caphuman.safety"]
    NAME = "package.module:function"
"""
from collections.abc import Callable
from importlib.metadata import entry_points

import numpy as np
from jaxtyping import UInt8

from .errors import BadInput, Refused

GROUP = "caphuman.safety"
Check = Callable[[UInt8[np.ndarray, "h w 3"]], str | None]


def load_check(name: str) -> Check:
    """The installed check of this name. Raises BadInput where there is none, or where it cannot be loaded."""
    installed = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in installed:
        known = f"installed: {', '.join(sorted(installed))}" if installed else (
            f"none is installed: a package brings one as an entry point in the group {GROUP}, a function of a picture")
        raise BadInput(f"safety check {name!r} is not known, {known}")
    try:
        check = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"safety check {name!r} cannot be loaded ({error}); install its package again") from error
    if not callable(check):
        raise BadInput(f"safety check {name!r} is no function, expected {installed[name].value} to be one of a picture")
    return check


def require_safe(name: str, check: Check, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Raise Refused, with the check's reason, where it turns the picture down.

    The check sees a copy and cannot change the picture. An answer that is neither None nor a reason counts as no.
    """
    answer = check(pixels.copy())
    if answer is not None:
        reason = answer if isinstance(answer, str) and answer.strip() else f"its answer was {answer!r}"
        raise Refused(f"safety check {name!r} turned the picture down ({' '.join(reason.split())}); "
                      "change the prompt or the seed")
