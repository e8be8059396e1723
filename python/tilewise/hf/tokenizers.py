"""Text to tokens and back: bytes for models that speak bytes, transformers' tokenizers for the rest."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any, Protocol

from tilewise.errors import VocabularyError

__all__ = ["ByteTokenizer", "HubTokenizer", "TextStream", "Tokenizer"]


class TextStream(Protocol):
    """Turns tokens into text as they come. No character is shown before all of its bytes are known."""

    def feed(self, token: int) -> str:
        """Add a token; returns the text that became certain, often empty."""
        ...

    def finish(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character."""
        ...


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens."""
        ...

    def stream(self) -> TextStream:
        """A fresh incremental decoder."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8: token ids are 0 to 255 and nothing else exists.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("dé")
        [100, 195, 169]
        >>> stream = tokenizer.stream()
        >>> [stream.feed(token) for token in (100, 195, 169)]
        ['d', '', 'é']
    """

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes of the text; lone surrogates (from undecodable file names) pass through as their bytes."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the bytes, with U+FFFD for what is not UTF-8."""
        return _as_bytes(tokens).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """An incremental UTF-8 decoder."""
        return _ByteStream()


def _as_bytes(tokens: Iterable[int]) -> bytes:
    values = list(tokens)
    try:
        return bytes(values)
    except ValueError:
        wrong = next(value for value in values if not 0 <= value < 256)
        raise VocabularyError(f"a byte tokenizer knows tokens 0 to 255, got {wrong}") from None


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(_as_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HubTokenizer:
    """A tokenizer of transformers, with incremental decoding."""

    def __init__(self, inner: Any):
        self.inner = inner

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.inner)

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer puts in front of one."""
        return list(self.inner(text)["input_ids"])

    def decode(self, tokens: Iterable[int]) -> str:
        """Text without special tokens."""
        return self.inner.decode(list(tokens), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """An incremental decoder that holds back unfinished characters."""
        return _HubStream(self)


class _HubStream:
    """Decodes a window of recent tokens twice, without and with the newest: the difference is new text.

    Tokens before the window do not matter to it, so a long generation costs no more a token than a short one; the
    window begins with tokens already shown, because many tokenizers decode a first token differently (leading space).
    """

    def __init__(self, tokenizer: HubTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = 0  # start of the window
        self._shown = 0  # tokens whose text has been returned

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._tokens[self._begin : end])

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        before, now = self._text(self._shown), self._text(len(self._tokens))
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._text(self._shown), self._text(len(self._tokens))
        self._begin = self._shown = len(self._tokens)
        return now[len(before) :]
