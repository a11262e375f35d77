"""Weights and long prompts: what becomes a weight, what stays text, and how hidden states are weighted."""
import numpy as np
import pytest

from caphuman_edge.runtime import prompt
from caphuman_edge.runtime.errors import BadInput
from caphuman_edge.runtime.prompt import encode, pad, text_tokens, weigh
from caphuman_edge.runtime.tokenizer import END, START, Tokenizer

PLAIN = [
    "", "a photo of a woman, red hair", "(masterpiece), [best quality], ((detailed))", "a :) smile (: and ) ( (",
    "they've said: (a:b) [c:1.3] {d:1.3}", "&lt;b&gt; caf\u00e9 \u2603 \uff08wide\uff09", "very " * 75,
    "a(b)c (d", "(:1.3) (1.3)", "C:\\temp",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def weighted(tokenizer, text: str) -> list[tuple[str, float]]:
    """Each token of the first window as text, with its weight."""
    windows = encode(tokenizer, text)
    return [(tokenizer.decode([int(token)]), round(float(weight), 4)) for token, weight
            in zip(windows.ids[0], windows.weights[0], strict=True) if token < START]


def states(count: int = 1, mean: float = 0.3) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, 1, (count, 77, 8)).astype(np.float32)


@pytest.mark.parametrize("text", PLAIN)
def test_a_prompt_without_weights_has_the_tokens_of_the_tokenizer(tokenizer, text):
    windows = encode(tokenizer, text)
    assert windows.ids.dtype == np.int64 and windows.weights.dtype == np.float32
    np.testing.assert_array_equal(windows.ids, tokenizer.encode(text))
    np.testing.assert_array_equal(windows.weights, np.ones((1, 77), np.float32))


@pytest.mark.parametrize(("text", "want"), [
    ("a (red hat:1.3) here", [("a", 1), ("red", 1.3), ("hat", 1.3), ("here", 1)]),
    ("(red:0)", [("red", 0)]), ("(red:2)", [("red", 2)]), ("(red: .5 )", [("red", 0.5)]), ("(red:+1.)", [("red", 1)]),
    ("sun(flower:1.2)s", [("sun", 1), ("flower", 1.2), ("s", 1)]),
    ("(at 9:30 sharp:1.2)", [(part, 1.2) for part in ("at", "9", ":", "3", "0", "sharp")]),
    ("\uff08red\uff1a1.3\uff09", [("red", 1.3)]),  # full-width, as other keyboards write it
])
def test_a_number_at_the_end_of_parentheses_weighs_their_words(tokenizer, text, want):
    assert weighted(tokenizer, text) == want


def test_factors_of_nested_parentheses_multiply(tokenizer):
    assert weighted(tokenizer, "(a (red:1.5) hat:0.5)") == [("a", 0.5), ("red", 0.75), ("hat", 0.5)]
    assert weighted(tokenizer, "((red:1.2):1.1) hat") == [("red", 1.32), ("hat", 1)]


def test_plain_parentheses_inside_a_weight_are_text(tokenizer):
    assert weighted(tokenizer, "(a (red) hat:1.2)") == [(part, 1.2) for part in ("a", "(", "red", ")", "hat")]


def test_escaped_parentheses_are_text(tokenizer):
    windows = encode(tokenizer, r"\(red:1.3\)")
    np.testing.assert_array_equal(windows.ids, tokenizer.encode("(red:1.3)"))
    assert (windows.weights == 1).all()
    assert weighted(tokenizer, r"(a \(red\):1.3)") == [("a", 1.3), ("(", 1.3), ("red", 1.3), (")", 1.3)]


@pytest.mark.parametrize("text", ["(red:1.3", "red:1.3)", "(red:1.3\\)", ")red:1.3("])
def test_unbalanced_parentheses_are_text(tokenizer, text):
    windows = encode(tokenizer, text)
    assert (windows.weights == 1).all()
    np.testing.assert_array_equal(windows.ids, tokenizer.encode(text.replace("\\", "")))


def test_an_unbalanced_parenthesis_takes_no_weight_away_from_others(tokenizer):
    assert weighted(tokenizer, "( (red:1.3) hat") == [("(", 1), ("red", 1.3), ("hat", 1)]


@pytest.mark.parametrize("number", ["2.1", "-0.1", "nan", "NaN", "inf", "1e9", "30"])
def test_a_weight_out_of_range_is_refused_with_words_range_and_remedy(tokenizer, number):
    with pytest.raises(BadInput) as caught:
        encode(tokenizer, f"a (red\nhat:{number})")
    line = str(caught.value)
    assert f"'red hat' is {number.lower()}, expected 0 to 2" in line and r"\( and \)" in line and "\n" not in line


def test_weights_that_multiply_to_more_than_two_are_refused(tokenizer):
    with pytest.raises(BadInput, match="multiply to 2.25, expected at most 2"):
        encode(tokenizer, "((red:1.5):1.5)")


def test_a_prompt_of_nothing_but_parentheses_is_quick(tokenizer):
    assert len(encode(tokenizer, "(" * 1200 + "a" + ":1)" * 1200).ids) == 1
    with pytest.warns(UserWarning, match="has 2500 tokens, 300 are read"):
        assert len(encode(tokenizer, "(" * 5000).ids) == 4


def test_a_long_prompt_takes_as_many_windows_as_it_needs(tokenizer, recwarn):
    windows = encode(tokenizer, "very " * 160)
    assert windows.ids.shape == windows.weights.shape == (3, 77)
    assert [(row[1:] != END).sum() for row in windows.ids] == [75, 75, 10]
    assert (windows.ids[:, 0] == START).all() and (windows.ids[:, 76] == END).all()
    assert not recwarn.list


def test_a_word_stays_in_one_window(tokenizer):
    word = tokenizer.tokens("antidisestablishmentarianism")
    first, second = encode(tokenizer, "very " * 72 + "antidisestablishmentarianism hat").ids
    assert first.tolist() == [START, *[1070] * 72, *[END] * 4]
    assert second[1:len(word) + 2].tolist() == [*word, *tokenizer.tokens("hat")]


def test_a_word_longer_than_a_window_is_cut_where_the_window_ends(tokenizer):
    tokens = tokenizer.tokens("a " + "qz" * 70)
    assert 76 < len(tokens) <= 150
    windows = encode(tokenizer, "a " + "qz" * 70)
    assert [token for row in windows.ids for token in row if token < START] == tokens
    assert (windows.ids[0, 1:76] < START).all()


def test_weights_go_with_their_words_into_the_next_window(tokenizer):
    windows = encode(tokenizer, "very " * 74 + "(red hat:1.5)")
    assert windows.weights[0, 75] == windows.weights[1, 1] == 1.5
    assert windows.weights.sum() == 2 * 77 + 2 * 0.5


def test_what_four_windows_do_not_hold_is_cut_with_a_warning_that_quotes_it(tokenizer):
    with pytest.warns(UserWarning, match="the prompt has 302 tokens, 300 are read; left out: 'red hat'"):
        windows = encode(tokenizer, "very " * 300 + "(red:1.1) hat")
    assert windows.ids.shape == (4, 77) and (windows.ids[:, 1:76] == 1070).all()


def test_padding_adds_windows_of_an_empty_prompt(tokenizer):
    padded = pad(encode(tokenizer, "(red:1.5) hat"), 3)
    empty = tokenizer.encode("")
    np.testing.assert_array_equal(padded.ids, [*encode(tokenizer, "red hat").ids, *empty, *empty])
    assert padded.weights[0, 1] == 1.5 and (padded.weights[1:] == 1).all()


def test_weights_of_one_leave_hidden_states_as_they_are_to_the_bit():
    hidden = states(2)
    np.testing.assert_array_equal(weigh(hidden, np.ones((2, 77), np.float32)), hidden.reshape(1, 154, 8))


def test_a_weight_pulls_its_token_up_against_the_others_and_the_window_keeps_its_mean():
    hidden, weights = states(2), np.ones((2, 77), np.float32)
    weights[0, 3:20] = 1.5
    out = weigh(hidden, weights).reshape(2, 77, 8)
    np.testing.assert_allclose(out[0].mean(), hidden[0].mean(), rtol=1e-5)
    ratio = out[0] / hidden[0]
    np.testing.assert_allclose(ratio[3:20] / ratio[30], 1.5, rtol=1e-5)
    assert 0.8 < ratio[30, 0] < 1
    np.testing.assert_array_equal(out[1], hidden[1])


@pytest.mark.parametrize("mean", [0.0, 0.001, -0.001])
def test_a_window_whose_mean_tells_nothing_is_weighted_but_not_blown_up(mean):
    hidden, weights = states(), np.ones((1, 77), np.float32)
    hidden += np.float32(mean) - hidden.mean()
    weights[0, 1:9] = 1.8
    np.testing.assert_allclose(weigh(hidden, weights)[0], hidden[0] * weights[0, :, None], rtol=1e-6)


def test_a_window_without_weight_left_is_zero_not_nan():
    assert not weigh(states(), np.zeros((1, 77), np.float32)).any()


def test_prompt_and_negative_get_equally_many_tokens(tokenizer):
    def encode_text(ids):
        calls.append(ids)
        return np.repeat(ids[..., None], 4, axis=2).astype(np.float32)

    calls: list[np.ndarray] = []
    tokens = text_tokens(tokenizer, ["ugly", "very " * 80], encode_text)
    assert tokens.shape == (2, 154, 4) and len(calls) == 1
    np.testing.assert_array_equal(tokens[0, :, 0], [*tokenizer.encode("ugly")[0], *tokenizer.encode("")[0]])
    np.testing.assert_array_equal(tokens[1, :, 0], encode(tokenizer, "very " * 80).ids.ravel())


def test_text_tokens_of_short_plain_prompts_are_what_the_encoder_gives(tokenizer):
    hidden = states(2)
    np.testing.assert_array_equal(text_tokens(tokenizer, ["ugly", "a (hat)"], lambda ids: hidden), hidden)


def test_weights_reach_the_text_tokens(tokenizer):
    hidden = states(1)
    tokens = text_tokens(tokenizer, ["(red:1.5) hat"], lambda ids: hidden)
    np.testing.assert_allclose((tokens[0, 1] / hidden[0, 1]) / (tokens[0, 2] / hidden[0, 2]), 1.5, rtol=1e-5)
    assert prompt.MOST_WINDOWS == 4
