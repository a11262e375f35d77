"""The shaders as text, for whichever GL the host has. README.md says what a port has to set up."""
from importlib.resources import files
from typing import Literal

Dialect = Literal["gl", "es"]

_VERSION: dict[Dialect, str] = {"gl": "#version 330 core\n", "es": "#version 300 es\n"}


def load(name: str, dialect: Dialect) -> str:
    """Source of `<name>.glsl` (such as "maps.vert") under desktop GL 3.3 core's or OpenGL ES 3.0's version header."""
    return _VERSION[dialect] + (files(__package__) / f"{name}.glsl").read_text(encoding="utf-8")
