"""Every error a user can cause, in one tree.

    CapHumanError                    the base: catch this one
    ├── BadImage                     a photo cannot be read or used
    ├── FaceError                    no face, several faces, or a face that cannot be measured
    ├── BadInput                     a control, number or prompt is out of range
    ├── BundleError                  a bundle is missing, truncated, altered or of another format
    │   └── ShapeMismatch            a graph or tensor has another name, shape or dtype than the contract
    ├── CheckpointError              a checkpoint lacks keys, has foreign ones, or is no checkpoint
    ├── MissingExtra                 an optional dependency is not installed
    ├── Refused                      the safety check that was asked for turned a picture down
    └── RenderError                  no renderer can run here

Messages are one line: the value, what was expected, the remedy. The command line prints them and exits with 2.
"""


class CapHumanError(Exception):
    """Base of all errors that a user can cause and mend."""


class BadImage(CapHumanError):
    """A photo cannot be read or used."""


class FaceError(CapHumanError):
    """No face, several faces, or a face that cannot be measured."""


class BadInput(CapHumanError):
    """A control, number or prompt is out of range."""


class BundleError(CapHumanError):
    """A bundle is missing, truncated, altered or of another format."""


class ShapeMismatch(BundleError):
    """A graph or tensor has another name, shape or dtype than the contract."""


class CheckpointError(CapHumanError):
    """A checkpoint lacks keys, has foreign ones, or is no checkpoint."""


class MissingExtra(CapHumanError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {package}: pip install 'caphuman-edge[{extra}]'")


class Refused(CapHumanError):
    """The safety check that was asked for turned a picture down."""


class RenderError(CapHumanError):
    """No renderer can run here."""
