"""`make demo`: the astronaut out of scikit-image's wheel, at two head poses."""
import json
import zipfile

import pytest
from PIL import Image

from caphuman_edge.runtime.demo import ASTRONAUT, YAWS, astronaut, main
from caphuman_edge.runtime.errors import BadImage, BadInput
from caphuman_edge.runtime.image import load_photo


@pytest.fixture
def wheel(tmp_path, photo):
    path = tmp_path / "scikit_image-0.26.0.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(photo, ASTRONAUT)
    return path


def test_the_demo_writes_two_portraits_and_a_sheet(wheel, folder, capfd):
    assert main(["--photo", str(wheel), "--out", "demo", "--steps", "1"]) == 0
    printed = capfd.readouterr().out.split()
    assert printed == ["demo/portrait.png", "demo/portrait-2.png", "demo/contact_sheet.png"]
    for name, yaw in YAWS.items():
        with Image.open(folder / "demo" / name) as portrait:
            assert json.loads(portrait.text["caphuman"])["people"][0]["controls"]["yaw"] == yaw
    height, width, _ = load_photo(folder / "demo" / "contact_sheet.png").shape
    assert width > 5 * 256 and 2 * 256 < height < 3 * 256  # photo, three maps and portrait, twice


def test_another_picture_in_the_wheel_is_refused(wheel):
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(ASTRONAUT, b"another picture")
    with pytest.raises(BadImage, match="scikit-image 0.26.0"):
        astronaut(wheel)


def test_a_damaged_member_of_the_wheel_is_refused(wheel, photo):
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(photo, ASTRONAUT)
    content = bytearray(wheel.read_bytes())
    content[100:200] = bytes(255 for _ in range(100))
    wheel.write_bytes(content)
    with pytest.raises(BadImage, match="download scikit-image's wheel again"):
        astronaut(wheel)


def test_a_place_where_the_photo_cannot_be_written_is_named(wheel):
    (wheel.parent / "astronaut.png").mkdir()
    with pytest.raises(BadInput, match="cannot write .*astronaut.png"):
        astronaut(wheel)


def test_a_broken_wheel_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "broken.whl").write_bytes(b"half")
    assert main(["--photo", str(tmp_path / "broken.whl")]) == 2
    err = capfd.readouterr().err
    assert "broken.whl" in err and err.count("\n") == 1
