"""Prompts with weights and of any length: windows of 77 tokens, each token with a weight, and what comes of them.

`(words:1.3)` weighs words, 0 to 2. Parentheses may stand in each other: their factors multiply. `\\(` and `\\)` are
plain parentheses. All else stays text, unlike in other tools: parentheses without `:number` at their end, unbalanced
ones, square brackets. A prompt without any of that therefore has the very tokens that `Tokenizer.encode` gives.
"""
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from .contract import TEXT_TOKENS
from .errors import BadInput
from .tokenizer import END, START, WINDOW, Tokenizer

MOST_WINDOWS = 4
HEAVIEST = 2.0
PARENTHESIS = re.compile(r"\\[()]|[()]")
NUMBER = re.compile(r"\s*[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf)\s*")  # of cleaned text, which is lower case
TELLING_MEAN = 0.02  # of the root mean square; CLIP's is about 0.1, the miniature's below 0.002


@dataclass(frozen=True, eq=False)
class Windows:
    """A prompt as the text encoder reads it, and how much each token counts. START, END and padding have weight 1."""

    ids: Int64[np.ndarray, "k 77"]
    weights: Float32[np.ndarray, "k 77"]


def text_tokens(tokenizer: Tokenizer, texts: Sequence[str],
                encode_text: Callable[[Int64[np.ndarray, "n 77"]], Float32[np.ndarray, "n 77 c"]],
                ) -> Float32[np.ndarray, "b tokens c"]:
    """Text tokens of several prompts, equally many each: 77 for every window that the longest of them needs.

    All windows go through `encode_text` in one call. Raises BadInput as `encode` does.
    """
    prompts = [encode(tokenizer, text) for text in texts]
    longest = max(len(windows.ids) for windows in prompts)
    padded = [pad(windows, longest) for windows in prompts]
    hidden = encode_text(np.concatenate([windows.ids for windows in padded]))
    parts = np.split(hidden, len(padded))
    return np.concatenate([weigh(part, windows.weights) for part, windows in zip(parts, padded, strict=True)])


def most_windows(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """How many windows the longest of these prompts needs. Warns and raises as `encode` does."""
    return max(len(encode(tokenizer, text).ids) for text in texts)


def encode(tokenizer: Tokenizer, text: str) -> Windows:
    """As many windows as the text needs, at least one; a word is not cut in two unless it is longer than a window.

    What four windows do not hold is cut off with a warning that quotes it. Raises BadInput for a weight outside of
    0 to 2, and for more than 5,000 characters.
    """
    spans = _weighted(tokenizer.clean(text))
    windows = _packed((ids, weight) for words, weight in spans for ids in tokenizer.words(words))
    everything = [token for window in windows for token, _ in window]
    tokenizer.cut(everything, sum(map(len, windows[:MOST_WINDOWS])))
    return _arrays(windows[:MOST_WINDOWS])


def pad(windows: Windows, count: int) -> Windows:
    """`count` windows in all: behind the prompt's own come those of an empty prompt."""
    more = _arrays([[]] * (count - len(windows.ids)))
    return Windows(np.concatenate([windows.ids, more.ids]), np.concatenate([windows.weights, more.weights]))


def weigh(hidden: Float32[np.ndarray, "k 77 c"],
          weights: Float32[np.ndarray, "k 77"]) -> Float32[np.ndarray, "1 tokens c"]:
    """Multiply each token's hidden state by its weight, then scale each window so that it keeps its mean.

    That is the convention of AUTOMATIC1111's stable-diffusion-webui (emphasis "Original"): the mean is taken over all
    numbers of a window, START, END and padding included. Where it is too near to zero to tell anything, its ratio would
    blow the window up or turn its sign (issue 14867 there); such a window is weighted and not scaled, as with emphasis
    "No norm". Windows whose weights are all 1 keep their values to the bit.
    """
    out = hidden.copy()
    for k in np.flatnonzero((weights != 1).any(axis=1)):
        weighted = hidden[k] * weights[k, :, None]
        before, after = _telling_mean(hidden[k]), _telling_mean(weighted)
        scale = before / after if before * after > 0 else 1.0
        out[k] = weighted * np.float32(scale)
    return out.reshape(1, -1, hidden.shape[2])


def _telling_mean(values: Float32[np.ndarray, "77 c"]) -> float:
    """The mean, or 0 where it is small beside the values."""
    mean = float(values.mean(dtype=np.float64))
    size = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
    return mean if abs(mean) >= TELLING_MEAN * size else 0.0


def _weighted(text: str) -> Iterator[tuple[str, float]]:
    """A cleaned text in spans of one weight; the border of a span is the border of a word."""
    factors, ends = _groups(text)
    weights, span, position = [1.0], "", 0
    while position < len(text):
        if position in factors or position in ends:
            yield span, weights[-1]
            span = ""
        if position in factors:
            weights.append(_product(weights[-1], factors[position], text[position:]))
            position += 1
        elif position in ends:
            weights.pop()
            position = ends[position]
        else:
            escaped = text[position:position + 2] in (r"\(", r"\)")
            span += text[position + escaped]
            position += 1 + escaped
    yield span, weights[-1]


def _groups(text: str) -> tuple[dict[int, float], dict[int, int]]:
    """Of each weighted group: its factor, by where it opens; and where it ends, by where its `:number)` begins."""
    factors, ends, opened = {}, {}, []
    for sign in PARENTHESIS.finditer(text):
        if sign[0] == "(":
            opened.append(sign.start())
        elif sign[0] == ")" and opened:
            start, stop = opened.pop(), sign.start()
            colon = text.rfind(":", start, stop)
            words = text[start + 1:colon] if colon > start else ""
            if words.strip() and NUMBER.fullmatch(text, colon + 1, stop):
                factors[start], ends[colon] = _factor(text[colon + 1:stop], words), sign.end()
    return factors, ends


def _factor(number: str, words: str) -> float:
    factor = float(number)
    if not 0 <= factor <= HEAVIEST:  # also refuses NaN
        raise BadInput(f"the weight of {_quoted(words)} is {number.strip()}, expected 0 to {HEAVIEST:g}; "
                       r"parentheses that are no weight are written \( and \)")
    return factor


def _product(outer: float, factor: float, words: str) -> float:
    weight = outer * factor
    if weight > HEAVIEST:
        raise BadInput(f"the weights around {_quoted(words)} multiply to {weight:.3g}, expected at most {HEAVIEST:g}; "
                       "lower one of them")
    return weight


def _quoted(words: str) -> str:
    return repr(words if len(words) <= 40 else f"{words[:39]}…")


def _packed(words: Iterator[tuple[list[int], float]]) -> list[list[tuple[int, float]]]:
    """Words with weights as tokens with weights, at most 75 a window."""
    windows: list[list[tuple[int, float]]] = [[]]
    for ids, weight in words:
        if WINDOW - len(windows[-1]) < len(ids) <= WINDOW:
            windows.append([])
        for token in ids:
            if len(windows[-1]) == WINDOW:
                windows.append([])
            windows[-1].append((token, weight))
    return windows


def _arrays(windows: Sequence[Sequence[tuple[int, float]]]) -> Windows:
    ids = np.full((len(windows), TEXT_TOKENS), END, np.int64)
    weights = np.ones((len(windows), TEXT_TOKENS), np.float32)
    ids[:, 0] = START
    for k, window in enumerate(windows):
        for position, (token, weight) in enumerate(window, 1):
            ids[k, position], weights[k, position] = token, weight
    return Windows(ids, weights)
