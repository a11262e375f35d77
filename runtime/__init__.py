"""The runtime: from one photo, a head pose and a prompt to a portrait, in numpy.

    from caphuman_edge.runtime import Bundle, Pipeline

Names load when they are asked for, so that importing one part never costs the others.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle
    from .canvas import Canvas
    from .errors import CapHumanError
    from .pipeline import Pipeline
    from .portrait import Portrait, Step
    from .request import Person, Settings

__all__ = ["Bundle", "Canvas", "CapHumanError", "Person", "Pipeline", "Portrait", "Settings", "Step"]
_HOMES = {"Bundle": "bundle", "Canvas": "canvas", "CapHumanError": "errors", "Person": "request",
          "Pipeline": "pipeline", "Portrait": "portrait", "Settings": "request", "Step": "portrait"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
