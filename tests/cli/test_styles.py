"""Styles put words around a prompt; files of the user's are data that may be wrong in any way."""
import json

import pytest

from caphuman_edge.runtime.cli.styles import STYLES, apply_style, read_styles
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.tokenizer import WINDOW, Tokenizer


@pytest.fixture
def styles_file(tmp_path):
    def write(content: object):
        file = tmp_path / "styles.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return file

    return write


@pytest.mark.parametrize("name", sorted(read_styles(STYLES)))
def test_every_style_of_ours_words_a_prompt_and_leaves_room_for_it(name):
    prompt, negative = apply_style(name, "a woman with red hair", "hat")
    assert "a woman with red hair" in prompt and len(prompt) > 60
    assert negative.startswith("hat, ") and len(negative) > 20
    assert len(Tokenizer().tokens(apply_style(name, "", "")[0])) <= WINDOW // 2


def test_there_are_styles_of_photos_paintings_and_drawings():
    assert {"photo", "studio", "oil-painting", "watercolour", "pencil", "comic", "film", "cyberpunk"} <= set(
        read_styles(STYLES))


def test_an_empty_prompt_leaves_no_loose_commas(styles_file):
    file = styles_file({"a": {"prompt": "{prompt}, oil, warm"}, "b": {"prompt": "oil, {prompt}, warm", "negative": ""}})
    assert apply_style("a", "", "", file) == ("oil, warm", "")
    assert apply_style("b", " ", "hat", file) == ("oil, warm", "hat")


def test_a_file_adds_styles_and_comes_before_ours(styles_file):
    file = styles_file({"mine": {"prompt": "<{prompt}>", "negative": "bad"}, "photo": {"prompt": "snap of {prompt}"}})
    assert apply_style("mine", "x", "", file) == ("<x>", "bad")
    assert apply_style("photo", "x", "n", file) == ("snap of x", "n")
    assert "x" in apply_style("comic", "x", "", file)[0]


def test_words_with_braces_are_put_in_as_they_are(styles_file):
    file = styles_file({"mine": {"prompt": "{0} {prompt} {x.y}"}})
    assert apply_style("mine", "{prompt} {negative}", "", file)[0] == "{0} {prompt} {negative} {x.y}"


def test_an_unknown_style_lists_the_known_ones(styles_file):
    file = styles_file({"mine": {"prompt": "{prompt}"}})
    with pytest.raises(BadInput, match="style 'baroque' is not known, expected one of comic, .*mine, .*watercolour"):
        apply_style("baroque", "x", "", file)


@pytest.mark.parametrize(("content", "match"), [
    (b"", "not JSON"), (b"\xff\xfe\x00", "not JSON"), (b"[" * 100_000, "not JSON"), (b" " * 1_000_001, "longer than"),
    ([], "holds no styles"), ({}, "holds no styles"), ({"a": "b"}, "is not {"), ({"a": {"negative": "x"}}, "is not {"),
    ({"a": {"prompt": "{prompt}", "seed": 1}}, "nothing else"), ({"a": {"prompt": 1}}, "no text"),
    ({"a": {"prompt": "{prompt}", "negative": None}}, "no text"), ({"a": {"prompt": "x" * 2001}}, "no text"),
    ({"a": {"prompt": "oil"}}, "0 times"), ({"a": {"prompt": "{prompt}{prompt}"}}, "2 times"),
])
def test_a_file_that_is_none_of_styles_is_refused_in_one_line(styles_file, content, match):
    with pytest.raises(BadInput, match=match) as caught:
        apply_style("photo", "x", "", styles_file(content))
    assert "styles.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot read .*No such file"):
        apply_style("photo", "x", "", tmp_path / "none.json")
