"""Memory that is let go of: pages of mapped weights, graphs whose stage is over."""
import mmap
import time
from pathlib import Path

import numpy as np
import pytest

from caphuman_edge.runtime import Bundle, Pipeline
from caphuman_edge.runtime.machine import EACH_STEP, Machine
from caphuman_edge.runtime.pages import MAPS, PERIOD, dropping_pages, mapped_under

linux = pytest.mark.skipif(not MAPS.exists(), reason="the system does not tell what is mapped where")
SIZE = 8 << 20


def resident(path: Path) -> int:
    """KiB of the file that are in this process's memory."""
    mappings = Path("/proc/self/smaps").read_text().split(f" {path}\n")[1:]
    return sum(int(mapping.split("Rss:")[1].split()[0]) for mapping in mappings)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@linux
def test_pages_of_a_file_that_was_read_are_dropped_and_read_again(weights):
    with open(weights, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        before = bytes(mapped)
        assert resident(weights) >= SIZE >> 10
        ranges = mapped_under(weights.parent)
        assert sum(length for _, length in ranges) == SIZE
        with dropping_pages(ranges):
            pass
        assert resident(weights) == 0
        assert bytes(mapped) == before


@linux
def test_what_somebody_may_have_written_and_other_folders_files_are_not_found(weights, tmp_path):
    with open(weights, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as copy:
        copy[:4] = b"mine"
        assert mapped_under(weights.parent) == set()
    with open(weights, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        (tmp_path / "elsewhere").mkdir()
        assert mapped_under(tmp_path / "elsewhere") == set()


@linux
def test_within_the_block_pages_do_not_pile_up(weights):
    with open(weights, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped, \
            dropping_pages(mapped_under(weights.parent)):
        assert len(bytes(mapped)) == SIZE
        time.sleep(3 * PERIOD)
        assert resident(weights) == 0


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The names of graphs as they are loaded."""
    names, original = [], Machine.load

    def load(machine, bundle, name):
        names.append(name)
        return original(machine, bundle, name)

    monkeypatch.setattr(Machine, "load", load)
    return names


def drawn(memory, stranger, portraits=1):
    """Pixels of the last of some portraits in a row, and the graphs that are still loaded."""
    with Pipeline(Bundle.open(), renderer="numpy", memory=memory) as pipe:
        person = stranger(pipe)
        for seed in range(portraits):
            *_, last = pipe.generate(person, prompt="a smiling woman", seed=seed)
            image = last.image
        return image.pixels.astype(int), set(pipe._graphs)


def test_every_memory_setting_draws_the_same_portrait(stranger):
    kept, _ = drawn("keep", stranger)
    steps, _ = drawn("steps", stranger)
    stage, _ = drawn("stage", stranger)
    assert kept.std() > 10
    assert (kept == steps).all()
    assert np.abs(kept - stage).mean() < 1  # CapFace and UNet apart, in int8: rounded at other places


def test_encoders_leave_before_the_first_step_and_are_not_needed_again(stranger, loads):
    _, held = drawn("steps", stranger, portraits=2)
    assert held <= {*EACH_STEP, "vae_decoder"}
    assert len(loads) == len(set(loads))  # the second portrait's prompt and person are remembered


def test_by_the_stage_one_graph_is_held_at_a_time(stranger, loads):
    _, held = drawn("stage", stranger)
    assert held == {"vae_decoder"}
    assert "denoiser" not in loads
    assert loads.count("capface") == loads.count("unet") == Bundle.open().schedule.steps


def test_a_preview_does_not_put_the_denoiser_out_of_memory(stranger, loads):
    with Pipeline(Bundle.open(), renderer="numpy", memory="stage") as pipe:
        for step in pipe.generate(stranger(pipe), steps=2):
            step.preview()
    assert loads.count("unet") == 2
