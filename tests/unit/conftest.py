"""What several files draw with: the embedded bundle, and somebody who was never photographed."""
import pytest


@pytest.fixture(scope="module")
def pipe():
    """A pipeline of the file's own: tests put recorders into it."""
    from caphuman_edge.runtime import Bundle, Pipeline  # not before the tests' import hook is in place

    return Pipeline(Bundle.open(), renderer="numpy")


@pytest.fixture(scope="module")
def subject(pipe, stranger):
    return stranger(pipe)
