"""How long a text can be and still fit into a number of tokens: a check that costs nothing beside tokenizing.

A byte-level BPE vocabulary cuts the UTF-8 of a text, after normalization, into tokens; it drops and invents nothing.
Each character has exactly one leading byte, and so belongs to exactly one token. Therefore

    characters of the normalized text  ≤  tokens × most leading bytes in any token
    characters of the text             ≤  characters of the normalized text × EXPANSION

The second line: normalization form C composes what is decomposed, so a text may have more characters than its
normalized form, but never more than that has when fully decomposed, which is EXPANSION times as many at most (Unicode
Standard Annex 15, "Maximum Expansion Factors"). NFC leaves ASCII as it is.

Both are bounds, so whatever is refused could not have fit; what passes is counted exactly once it is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers import Tokenizer

from lora_runtime.errors import ContextOverflow

EXPANSION = 4
"""Characters of a text in normalization form D for one of it in form C, at most: U+1F82 has four."""


class PromptLength:
    """The bound of one tokenizer. ``characters_per_token`` is None where nothing is known of the tokenizer's kind;
    then every text passes."""

    def __init__(self, backend: Tokenizer) -> None:
        described = json.loads(backend.to_str())
        self._normalizes = described.get("normalizer") is not None
        self.characters_per_token = _longest_token(described) if _is_byte_level(described) else None

    def may_exceed(self, num_characters: int, max_tokens: int) -> bool:
        """Whether a text of so many characters is worth a :meth:`check_text`."""
        return self.characters_per_token is not None and num_characters > max_tokens * self.characters_per_token

    def check_text(self, text: str, max_tokens: int, param: str) -> None:
        """Raise ContextOverflow for a text that is more than ``max_tokens`` tokens however it is tokenized."""
        if self.characters_per_token is None or not self.may_exceed(len(text), max_tokens):
            return
        expansion = EXPANSION if self._normalizes and not text.isascii() else 1
        most = max_tokens * self.characters_per_token * expansion
        if len(text) > most:
            raise ContextOverflow(
                f"The prompt has {len(text)} characters, and the context's {max_tokens} tokens hold at most {most}. "
                "Shorten the prompt.",
                param=param,
                prompt_characters=len(text),
                limit=max_tokens,
            )


def check_tokens(num_tokens: int, max_tokens: int, param: str) -> None:
    """Raise ContextOverflow for a prompt of more tokens than the whole context holds."""
    if num_tokens > max_tokens:
        raise ContextOverflow(
            f"The prompt has {num_tokens} tokens, but the context holds {max_tokens}. Shorten the prompt.",
            param=param,
            prompt_tokens=num_tokens,
            limit=max_tokens,
        )


def _longest_token(described: Mapping[str, Any]) -> int:
    """Characters that any one token can take of a text, at most."""
    byte_of = byte_alphabet()
    vocabulary = max(sum(_is_leading(byte_of[char]) for char in piece) for piece in described["model"]["vocab"])
    return max([vocabulary, *(len(added["content"]) for added in described["added_tokens"])])


def _is_leading(byte: int) -> bool:
    return byte & 0b1100_0000 != 0b1000_0000


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    """Whether each token stands for bytes of the text, and all bytes of it are in some token."""
    model = described["model"]
    if model["type"] != "BPE" or any(model.get(what) for what in ("continuing_subword_prefix", "end_of_word_suffix")):
        return False
    alphabet = byte_alphabet()
    if not alphabet.keys() <= model["vocab"].keys():  # bytes without a token would be left out
        return False
    if any(char not in alphabet for piece in model["vocab"] for char in piece):
        return False
    if any(added["lstrip"] or added["rstrip"] for added in described["added_tokens"]):  # take any white space along
        return False
    return _keeps_text(described["normalizer"], described["pre_tokenizer"])


def _keeps_text(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> bool:
    if normalizer is not None and normalizer["type"] != "NFC":
        return False
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    splits, last = steps[:-1], steps[-1]
    return last["type"] == "ByteLevel" and all(s["type"] == "Split" and s["behavior"] == "Isolated" for s in splits)


@cache
def byte_alphabet() -> Mapping[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}
