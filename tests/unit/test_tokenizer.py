"""The tokenizer against ids recorded with open_clip 3.3.0 (ftfy 6.3.1), and its windows.

For these texts open_clip and the tokenizer of the official tool agree. They part where text holds a "<": the official
one then leaves HTML entities as they are, and so does ours.
"""
import numpy as np
import pytest

from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.tokenizer import END, START, Tokenizer

RECORDED = [
    ("", []),
    ("a photo of a man wearing a suit in front of Space Needle",
     [320, 1125, 539, 320, 786, 3309, 320, 3940, 530, 2184, 539, 2138, 19886]),
    ("A Photo of a PERSON,  masterpiece!! 8k; it's café-style ☃, (detailed:1.2)",
     [320, 1125, 539, 320, 2533, 267, 12066, 748, 279, 330, 282, 585, 568, 15304, 268, 1844, 38972, 267, 263,
      12609, 281, 272, 269, 273, 264]),
    ("they've said we're 'still' here, I'd say; don't y'all'll",
     [889, 1200, 1946, 649, 982, 568, 4267, 262, 763, 267, 328, 1896, 1451, 282, 847, 713, 344, 262, 615, 1342]),
    ("smile \U0001f600\U0001f469\u200d\U0001f680 in 2024\u5e74",
     [3490, 12832, 26304, 13542, 530, 273, 271, 273, 275, 38780, 368]),
    ("“curly” ‘quotes’ – dash", [257, 20795, 257, 262, 5808, 262, 1224, 10206]),
    ("\uff26\uff55\uff4c\uff4c\u3000\uff57\uff49\uff44\uff54\uff48 \uff11\uff12\uff13", [1476, 23571, 272, 273, 274]),
    ("na\xefve cafe\u0301 \ufb01ne \u0132ssel", [1097, 35689, 563, 15304, 3797, 7337, 19373]),
    ("tabs\tand\nnew\r\nlines   and\xa0nbsp", [29163, 537, 686, 3418, 537, 6459, 4393]),
    ("&lt;b&gt; fish &amp; chips &eacute;", [283, 321, 285, 2759, 261, 8855, 4166]),
    ("x² ½ Ⅷ 一二三 ٣", [343, 41175, 33613, 158, 227, 371, 19759, 222, 21078, 234, 19759, 487, 149, 352]),
    ("Straße İstanbul ΑΓΆΠΗ σας",
     [1894, 127, 253, 324, 328, 16384, 11231, 138, 109, 138, 111, 138, 105, 139, 222, 138, 371, 139, 225, 138,
      109, 139, 480]),
    ("नमस्ते दुनिया", [3124, 101, 48254, 28505, 19389, 27263, 25130, 29552, 39653, 26090, 26721, 37299, 13343]),
    ("zero\u200bwidth\ufeff bom\x07", [5848, 9844, 23571, 19469]),
    ("!!!'s '' 's", [11194, 262, 338, 8445, 568]),
    ("50mm f/1.8 #portrait @home _under_score_",
     [276, 271, 2848, 325, 270, 272, 269, 279, 258, 5352, 287, 1137, 318, 1798, 318, 4431, 318]),
    ("한국어 초상화 かな漢字",
     [15197, 250, 31871, 255, 31625, 368, 168, 112, 230, 30587, 223, 31882, 498, 4813, 233, 29104, 162, 120, 95,
      35751, 501]),
    ("antidisestablishmentarianism", [3120, 4262, 7726, 12658, 1585, 44351]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.mark.parametrize(("text", "ids"), RECORDED)
def test_ids_are_those_of_open_clip(tokenizer, text, ids):
    assert tokenizer.tokens(text) == ids


def test_a_window_is_start_text_end_and_padding_with_end(tokenizer):
    ids = tokenizer.encode("a photo")
    assert ids.shape == (1, 77) and ids.dtype == np.int64
    assert ids[0].tolist() == [START, 320, 1125, *[END] * 74]


def test_an_empty_prompt_is_start_and_padding(tokenizer):
    assert tokenizer.encode("")[0].tolist() == [START, *[END] * 76]


def test_75_tokens_fill_a_window_without_a_warning(tokenizer, recwarn):
    assert tokenizer.encode("very " * 75)[0].tolist() == [START, *[1070] * 75, END]
    assert not recwarn.list


def test_what_does_not_fit_is_cut_with_a_warning_that_quotes_it(tokenizer):
    with pytest.warns(UserWarning, match="the prompt has 77 tokens, 75 are read; left out: 'red hat'"):
        ids = tokenizer.encode("very " * 75 + "red hat")
    assert ids[0].tolist() == [START, *[1070] * 75, END]


def test_a_long_prompt_takes_as_many_windows_as_are_allowed(tokenizer):
    ids = tokenizer.encode("very " * 80, chunks=2).reshape(2, 77)
    assert ids[0].tolist() == [START, *[1070] * 75, END]
    assert ids[1].tolist() == [START, *[1070] * 5, *[END] * 71]


def test_special_tokens_in_the_text_are_themselves(tokenizer):
    assert tokenizer.tokens("<|startoftext|> a <|ENDOFTEXT|>") == [START, 320, END]


def test_entities_stay_where_the_text_holds_markup(tokenizer):
    assert tokenizer.decode(tokenizer.tokens("<i>&eacute;</i>")) == "< i >& eacute ;</ i >"


def test_what_is_no_entity_stays(tokenizer):
    assert tokenizer.tokens("salt & pepper; &nosuch;") == tokenizer.tokens("salt & pepper ; & nosuch ;")


def test_a_lone_surrogate_is_replaced(tokenizer):
    assert tokenizer.tokens("bad \udcff byte") == tokenizer.tokens("bad \ufffd byte")


def test_decoding_gives_the_cleaned_text(tokenizer):
    assert tokenizer.decode(tokenizer.tokens("A  CAF\u00c9 \u2603")) == "a caf\u00e9 \u2603"


def test_an_endless_prompt_is_refused_with_the_limit(tokenizer):
    with pytest.raises(BadInput, match="has 5001 characters, at most 5000"):
        tokenizer.encode("x" * 5001)


def test_a_word_of_the_longest_length_is_quick(tokenizer):
    assert len(tokenizer.tokens("qz" * 2500)) > 1000
