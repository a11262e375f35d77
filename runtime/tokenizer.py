"""CLIP's byte-pair tokenizer (Radford et al. 2021) without torch, transformers or third-party regular expressions.

Text is cleaned as the official tool's tokenizer does with ftfy at hand: HTML entities, ligatures, full-width forms,
straight quotes, control characters, NFC, white space, lower case. Left out is ftfy's repair of text that was decoded
with the wrong character set, and of entities in capitals. OpenAI's and open_clip's tokenizers differ in one thing: they
decode entities in text that holds a "<", and entities without a semicolon, too.
"""
import gzip
import html
import html.entities
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from .contract import TEXT_TOKENS
from .errors import BadInput

VOCABULARY = Path(__file__).parent / "data" / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # of the file's lines, after its header: those that CLIP's 49,408 ids leave room for
START, END = 49_406, 49_407  # END also pads
WINDOW = TEXT_TOKENS - 2  # tokens of text in a window, between START and END
MAX_CHARACTERS = 5_000  # merging is quadratic in the length of a word
SPECIALS = {"<|startoftext|>": START, "<|endoftext|>": END}
LITERALS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)")
ENTITY = re.compile(r"&(#?\w{1,31};)")


class Tokenizer:
    """Text to CLIP's ids, by its vocabulary of 48,894 merges."""

    def __init__(self, vocabulary: Path = VOCABULARY):
        letters = _byte_letters()
        merges = [tuple(line.split()) for line in gzip.decompress(vocabulary.read_bytes()).decode().split("\n")]
        self._ranks = {pair: rank for rank, pair in enumerate(merges[1:MERGES + 1])}
        symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in self._ranks)]
        self._ids = {symbol: number for number, symbol in enumerate(symbols)}
        self._byte_of = dict(zip(letters, _byte_order(), strict=True))
        self._letter_of = dict(zip(_byte_order(), letters, strict=True))

    def encode(self, text: str, chunks: int = 1) -> Int64[np.ndarray, "1 tokens"]:
        """Ids in `chunks` windows of 77, each START, up to 75 tokens of the text, END and padding.

        What does not fit is cut off with a warning that quotes it. Raises BadInput for more than 5,000 characters.
        """
        room = chunks * WINDOW
        tokens = self.cut(self.tokens(text), room)
        ids = np.full((chunks, TEXT_TOKENS), END, np.int64)
        ids[:, 0] = START
        for row, first in zip(ids, range(0, room, WINDOW), strict=True):
            window = tokens[first:first + WINDOW]
            row[1:len(window) + 1] = window
        return ids.reshape(1, -1)

    def tokens(self, text: str) -> list[int]:
        """The text's own ids, without START, END and padding: as many as its length in tokens."""
        return [token for word in self.words(self.clean(text)) for token in word]

    def clean(self, text: str) -> str:
        """The text as it is read; raises BadInput for more than 5,000 characters."""
        if len(text) > MAX_CHARACTERS:
            raise BadInput(f"the prompt has {len(text)} characters, at most {MAX_CHARACTERS} are read; shorten it")
        return _clean(text)

    def words(self, cleaned: str) -> list[list[int]]:
        """The ids of each word of a cleaned text; signs and single numerals are words, too."""
        return [self._word_tokens(word) for word in _words(cleaned)]

    def cut(self, tokens: list[int], room: int) -> list[int]:
        """The first `room` tokens; a warning quotes what is left out."""
        if len(tokens) > room:
            warnings.warn(f"the prompt has {len(tokens)} tokens, {room} are read; left out: "
                          f"{self.decode(tokens[room:])!r}", stacklevel=3)
        return tokens[:room]

    def decode(self, tokens: Iterable[int]) -> str:
        """The cleaned text that these ids stand for."""
        symbols = list(self._ids)
        letters = "".join(symbols[token] for token in tokens if token < START).replace("</w>", " ")
        return bytes(self._byte_of.get(letter, ord(" ")) for letter in letters).decode(errors="replace").strip()

    def _word_tokens(self, word: str) -> list[int]:
        if word in SPECIALS:
            return [SPECIALS[word]]
        letters = [self._letter_of[byte] for byte in word.encode()]
        return [self._ids[symbol] for symbol in self._merge([*letters[:-1], letters[-1] + "</w>"])]

    def _merge(self, symbols: list[str]) -> list[str]:
        """Join the pair that ranks first, everywhere, until no pair is in the vocabulary (Sennrich et al. 2016)."""
        unranked = len(self._ranks)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: self._ranks.get(pair, unranked))
            if best not in self._ranks:
                break
            symbols = _joined(symbols, best)
        return symbols


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if tuple(symbols[position:position + 2]) == pair else 1
        joined.append("".join(symbols[position:position + width]))
        position += width
    return joined


def _words(text: str) -> Iterator[str]:
    """Contractions, runs of letters, single numerals, runs of other signs; white space separates and is dropped."""
    position = 0
    while position < len(text):
        end = _word_end(text, position)
        if not text[position].isspace():
            yield text[position:end]
        position = end


def _word_end(text: str, start: int) -> int:
    if literal := LITERALS.match(text, start):
        return literal.end()
    kind, end = _kind(text[start]), start + 1
    while kind != "N" and end < len(text) and _kind(text[end]) == kind:
        end += 1
    return end


def _kind(character: str) -> str:
    """L for letters and N for numerals as Unicode has them, a space for white space, S for the rest."""
    category = unicodedata.category(character)[0]
    return category if category in "LN" else " " if character.isspace() else "S"


def _clean(text: str) -> str:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # argv may hold lone surrogates
    if "<" not in text:  # as ftfy: text with tags is markup, whose entities are meant
        text = ENTITY.sub(_unescaped, text)
    text = unicodedata.normalize("NFC", text.translate(REPLACED))
    return " ".join(text.split()).lower()


def _unescaped(entity: re.Match[str]) -> str:
    """The character that an HTML entity names; what is no entity stays as it is."""
    return html.unescape(entity[0]) if entity[1].startswith("#") else html.entities.html5.get(entity[1], entity[0])


def _replacements() -> dict[int, str | None]:
    """Characters to replace before NFC, by code point; None removes one."""
    full_width = range(0xFF01, 0xFFF0)
    ligatures = [0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07)]
    controls = [*range(9), 0xB, *range(0xE, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]
    return {
        **{code: unicodedata.normalize("NFKC", chr(code)) for code in [*full_width, *ligatures]},
        **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"), **dict.fromkeys(range(0x201C, 0x2020), '"'),
        **dict.fromkeys(controls),
    }


def _byte_order() -> list[int]:
    """All bytes in the vocabulary's order: printable ones first, then those that need a stand-in letter."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


def _byte_letters() -> list[str]:
    """A visible letter for each byte, in that order: its own Latin-1 character, or one from U+0100 on."""
    return [chr(byte) if n < 188 else chr(0x100 + n - 188) for n, byte in enumerate(_byte_order())]


REPLACED = _replacements()
