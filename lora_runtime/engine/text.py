"""Tokens to text, piece by piece: UTF-8 that spans tokens, stop strings, the bytes of a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from lora_runtime.engine.prompt_length import byte_alphabet
from lora_runtime.engine.protocol import Alternative, Token


class TokenText:
    """Text and bytes of single tokens of a byte-level BPE vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_of = byte_alphabet()

    def bytes_of(self, token_id: int) -> bytes:
        """The token's own bytes; a special token's are its spelling."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""  # a padded row of the vocabulary: no token has this id
        if token_id in self._tokenizer.added_tokens_decoder or any(char not in self._byte_of for char in piece):
            return str(piece).encode()
        return bytes(self._byte_of[char] for char in piece)

    def describe(self, token_id: int, logprob: float | None, best: Sequence[tuple[int, float]]) -> Token:
        """A chosen token as callers see it; ``best`` are (token, log-probability), best first."""
        top = tuple(
            Alternative(token_id=i, text=self._text(i), token_bytes=self.bytes_of(i), logprob=other)
            for i, other in best
        )
        return Token(
            token_id=token_id, text=self._text(token_id), token_bytes=self.bytes_of(token_id), logprob=logprob, top=top
        )

    def _text(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode("utf-8", errors="replace")


class TextStream:
    """The text of one choice, as far as it may be shown.

    Held back: bytes of an incomplete character, and a tail that might begin a stop string.
    ``stopped`` turns true when a stop string is complete; it and what follows are never shown.
    """

    def __init__(self, backend: Any, stop: tuple[str, ...]) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that may be shown now."""
        self._held += self._stream.step(self._backend, token_id) or ""
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = self._pending_length()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """The end: what was held back, unless a stop string ended it."""
        shown, self._held = self._held, ""
        return shown

    def _pending_length(self) -> int:
        """Length of the longest tail that some stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
