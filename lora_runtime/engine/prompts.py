"""Prompts to token ids: the base's chat template, image placeholders, explicit M-RoPE positions.

Text of a request never becomes a special token: where it spells one, it is tokenized as plain text.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lora_runtime.engine.images import ImageProcessor, Patches
from lora_runtime.engine.prompt_length import PromptLength, check_tokens
from lora_runtime.engine.protocol import ChatPrompt, ImagePart, Message, Prompt, TextPrompt, TokenPrompt
from lora_runtime.errors import InvalidRequest


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A prompt ready to run.

    ``ids``: token ids, image placeholders expanded. ``positions`` (3, len(ids)): temporal, height
    and width position of each token. ``next_position``: what the first generated token takes.
    ``images`` in order of their placeholders, each of which is ``image_token`` repeated. ``cache_scope``: as in
    :class:`lora_runtime.engine.protocol.GenerateRequest`.
    """

    ids: tuple[int, ...]
    positions: Tensor
    next_position: int
    images: tuple[Patches, ...]
    image_token: int
    cache_scope: str = ""

    def scoped(self, cache_scope: str) -> Prepared:
        """The same, sharing nothing that is kept of prompts and images with other scopes."""
        if not cache_scope:
            return self
        salted = (hashlib.sha256(f"{cache_scope}/{image.digest}".encode()).hexdigest() for image in self.images)
        images = tuple(replace(image, digest=digest) for image, digest in zip(self.images, salted, strict=True))
        return replace(self, images=images, cache_scope=cache_scope)


class PromptProcessor:
    """Renders and tokenizes. Safe to use from several threads."""

    def __init__(self, base_path: str, images: ImageProcessor, *, max_images: int, rope_index: Any) -> None:
        """``rope_index`` is the model's ``get_rope_index``: a pure function of ids and grids."""
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(base_path)
        # Whether specials in a text count is state of the backend, so each rule has a backend of its own.
        serialized = self.tokenizer.backend_tokenizer.to_str()
        self._with_specials = _untruncated(serialized)
        self._plain = _untruncated(serialized)
        self._plain.encode_special_tokens = True
        self._length = PromptLength(self._plain)
        self._images = images
        self._max_images = max_images
        self._rope_index = rope_index
        self._image_id: Any = self._with_specials.token_to_id("<|image_pad|>")
        self._specials = tuple(t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special)

    def prepare(self, prompt: Prompt, max_tokens: int = sys.maxsize) -> Prepared:
        """Decode, render, tokenize and place, without holding the interpreter for long.

        Raises InvalidRequest or InvalidImage, and ContextOverflow for a prompt of more than ``max_tokens``: before it
        is tokenized where its length says so.
        """
        if isinstance(prompt, ChatPrompt):
            images = self._decode(prompt.messages)
            ids = self._expand(self._render(prompt.messages, max_tokens), images)
            check_tokens(len(ids), max_tokens, "messages")
        elif isinstance(prompt, TextPrompt):
            images, ids = (), self._encode([(prompt.text, True)], max_tokens, "prompt")
        else:
            check_tokens(len(prompt.token_ids), max_tokens, "prompt")
            images, ids = (), self._checked(prompt.token_ids)
        if not ids:
            raise InvalidRequest("The prompt is empty; send at least one token.", param="prompt")
        positions, following = self._place(ids, images)
        return Prepared(tuple(ids), positions, following, images, self._image_id)

    async def check(self, prompt: Prompt, max_tokens: int) -> None:
        """Raise ContextOverflow for a prompt that is more than ``max_tokens`` however it is tokenized.

        Nothing is tokenized. A template may leave text out, so long chats are rendered, on a thread."""
        if isinstance(prompt, TokenPrompt):
            check_tokens(len(prompt.token_ids), max_tokens, "prompt")
        elif isinstance(prompt, TextPrompt):
            self._length.check_text(prompt.text, max_tokens, "prompt")
        elif self._length.may_exceed(sum(map(len, texts := _texts(prompt.messages))), max_tokens):
            rendered = await asyncio.to_thread(self._template, prompt.messages, texts)
            self._length.check_text(rendered, max_tokens, "messages")

    def _decode(self, messages: Sequence[Message]) -> tuple[Patches, ...]:
        parts = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        if len(parts) > self._max_images:
            raise InvalidRequest(
                f"The request has {len(parts)} images; at most {self._max_images} are allowed. Send fewer.",
                param="messages",
                images=len(parts),
                limit=self._max_images,
            )
        return tuple(
            self._images(part.data, where=f"image {number} of {len(parts)}") for number, part in enumerate(parts, 1)
        )

    def _render(self, messages: Sequence[Message], max_tokens: int) -> list[int]:
        texts = _texts(messages)
        rendered = self._template(messages, texts)
        # What is rendered counts, not what was sent: a template may leave some of it out.
        self._length.check_text(rendered, max_tokens, "messages")
        # Searched one by one: a regular expression would hold the interpreter for all of a text, many times as long.
        if not any(special in text for special in self._specials for text in texts):
            return self._encode([(rendered, False)], max_tokens, "messages")
        # Some text spells a special token. A mark that no text can hold stands in for each text while
        # the template is rendered; then template and texts are tokenized apart, each by its own rule.
        mark = secrets.token_hex(16)
        marked = self._template(messages, [f"{mark}{number};" for number in range(len(texts))])
        pieces = [
            (texts[int(piece)], True) if number % 2 == 1 else (piece, False)
            for number, piece in enumerate(re.split(rf"{mark}(\d+);", marked))
        ]
        return self._encode(pieces, max_tokens, "messages")

    def _template(self, messages: Sequence[Message], texts: Sequence[str]) -> str:
        remaining = iter(texts)
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": next(remaining)}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        rendered = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def _encode(self, pieces: Sequence[tuple[str, bool]], max_tokens: int, param: str) -> list[int]:
        """The ids of all ``pieces``, one after the other; of each, whether special tokens in it are plain text."""
        ids: list[int] = []
        for text, is_plain in pieces:
            self._length.check_text(text, max_tokens, param)
            _check_unicode(text, param)
            backend = self._plain if is_plain else self._with_specials
            # A batch of one: `encode` holds the interpreter's lock for its whole time, and batches do not.
            (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
            check_tokens(len(ids) + len(encoding), max_tokens, param)
            ids += encoding.ids
        return ids

    def _checked(self, ids: Sequence[int]) -> list[int]:
        size = len(self.tokenizer)
        for token in ids:
            if not 0 <= token < size or token == self._image_id:
                raise InvalidRequest(
                    f"Token id {token} cannot stand in a prompt: ids run from 0 to {size - 1}, and images go "
                    "through chat messages.",
                    param="prompt",
                )
        return list(ids)

    def _expand(self, ids: list[int], images: Sequence[Patches]) -> list[int]:
        expanded: list[int] = []
        remaining = iter(images)
        for token in ids:
            count = self._images.num_tokens(next(remaining).grid) if token == self._image_id else 1
            expanded += [token] * count
        return expanded

    def _place(self, ids: Sequence[int], images: Sequence[Patches]) -> tuple[Tensor, int]:
        if not images:
            return torch.arange(len(ids)).expand(3, -1), len(ids)
        row = torch.tensor([ids])
        positions, delta = self._rope_index(
            row, (row == self._image_id).int(), image_grid_thw=torch.tensor([image.grid for image in images])
        )
        return positions[:, 0], len(ids) + int(delta[0, 0])


def _texts(messages: Sequence[Message]) -> list[str]:
    return [part.text for message in messages for part in message.parts if not isinstance(part, ImagePart)]


def _check_unicode(text: str, param: str) -> None:
    """Raise InvalidRequest for half of a surrogate pair, which JSON can spell and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"Character {error.start} of a text is half of a surrogate pair. Send valid Unicode.", param=param
        ) from error


def _untruncated(serialized: str) -> Tokenizer:
    """A tokenizer that tokenizes all of a text, whatever its file says of lengths."""
    backend = Tokenizer.from_str(serialized)
    backend.no_truncation()
    backend.no_padding()
    return backend
