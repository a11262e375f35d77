"""What runs at each step loads on another thread, while photos are measured and encoded."""
import threading

import pytest

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.backends import Graph
from caphuman_edge.runtime.errors import BadInput, BundleError
from caphuman_edge.runtime.machine import EACH_STEP, Machine


@pytest.fixture
def loaded(monkeypatch) -> list[tuple[str, bool]]:
    """Graphs as they are loaded: the name, and whether by the main thread."""
    found, original = [], Machine.load

    def load(machine, bundle, name):
        found.append((name, threading.current_thread() is threading.main_thread()))
        return original(machine, bundle, name)

    monkeypatch.setattr(Machine, "load", load)
    return found


@pytest.fixture
def fresh():
    with Pipeline(Bundle.open(), renderer="numpy", memory="steps") as pipe:
        yield pipe


def test_the_denoiser_loads_beside_the_encoders_and_once(fresh, loaded, stranger):
    person = stranger(fresh)
    assert len(list(fresh.generate(person, steps=1))) == 1
    assert ("denoiser", False) in loaded
    assert all(main for name, main in loaded if name not in EACH_STEP)
    list(fresh.generate(person, steps=1))
    assert [name for name, _ in loaded].count("denoiser") == 1


def test_it_may_be_told_before_photos_are_measured_and_twice(fresh, loaded, stranger):
    settings = fresh.settings(steps=1)
    for _ in range(2):
        fresh.prepare(settings)
    assert fresh._ahead["denoiser"].result(timeout=60).run
    list(fresh.generate(stranger(fresh), settings=settings))
    assert [name for name, _ in loaded].count("denoiser") == 1


def test_several_people_have_the_split_denoiser_loaded(fresh, loaded):
    fresh.prepare(fresh.settings(people=2), people=2)
    for graph in list(fresh._ahead.values()):
        graph.result(timeout=60)
    assert [name for name, _ in loaded] == ["capface", "unet"]


def test_what_fails_there_is_told_by_who_needs_it(fresh, stranger, monkeypatch):
    original = Machine.load

    def load(machine, bundle, name):
        if name == "denoiser":
            raise BundleError("denoiser is damaged; rebuild the bundle")
        return original(machine, bundle, name)

    monkeypatch.setattr(Machine, "load", load)
    person = stranger(fresh)
    for _ in range(2):
        with pytest.raises(BundleError, match="denoiser is damaged"):
            list(fresh.generate(person, steps=1))


def test_it_is_prepared_for_the_shapes_that_the_call_has(fresh, stranger, monkeypatch):
    told, called, original = [], [], Machine.load

    def load(machine, bundle, name):
        graph = original(machine, bundle, name)
        if name not in EACH_STEP:
            return graph

        def run(arrays):
            called.append({key: array.shape for key, array in arrays.items()})
            return graph.run(arrays)
        return Graph(graph.name, graph.inputs, graph.outputs, run, told.append)

    monkeypatch.setattr(Machine, "load", load)
    long = "a woman with a very long and winding description of her " * 8  # two windows
    list(fresh.generate(stranger(fresh), steps=1, prompt=long, guidance=2.0, identity_guidance=1.0))
    assert told == called == [{**called[0], "text_tokens": (2, 154, 64)}]


def test_a_prompt_that_cannot_be_read_is_refused_before_anything_loads(fresh, loaded):
    with pytest.raises(BadInput, match="weight"):
        fresh.prepare(fresh.settings(prompt="(smiling:9)"))
    assert loaded == []


def test_by_the_stage_nothing_is_loaded_ahead(loaded):
    with Pipeline(Bundle.open(), renderer="numpy", memory="stage") as pipe:
        pipe.prepare(pipe.settings())
        assert not pipe._ahead and loaded == []
