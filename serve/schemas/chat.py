"""``POST /v1/chat/completions``: bodies, and their translation to the engine's words and back."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_runtime.engine.protocol import ChatPrompt, ImagePart, Message, Role, Sampling, TextPart, Token
from lora_runtime.errors import InvalidImage, InvalidRequest
from serve.schemas.common import Body, Items, SampledBody, Usage

MAX_TOP_LOGPROBS = 20
MAX_PARTS = 256
"""Of one message."""


class TextContent(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str = Field(examples=["data:image/png;base64,iVBORw0KGgo…"])
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[Items[Content], Field(max_length=MAX_PARTS)]
    name: str | None = Field(default=None, max_length=128)

    @property
    def has_images(self) -> bool:
        return not isinstance(self.content, str) and any(isinstance(part, ImageContent) for part in self.content)

    def urls(self) -> Iterator[str]:
        """Of images that are to be fetched."""
        if isinstance(self.content, str):  # whose parts would be its characters
            return
        for part in self.content:
            if isinstance(part, ImageContent) and not is_data_uri(part.image_url.url):
                yield part.image_url.url

    def to_message(self, number: int, fetched: Mapping[str, bytes]) -> Message:
        """``fetched``: the images at :meth:`urls`. Raises InvalidImage."""
        role: Role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role=role, parts=(TextPart(text=self.content),))
        parts = tuple(
            TextPart(text=part.text)
            if isinstance(part, TextContent)
            else ImagePart(data=_image(part.image_url.url, f"messages[{number}]", fetched))
            for part in self.content
        )
        return Message(role=role, parts=parts)


class ChatRequest(SampledBody):
    """OpenAI's chat request; ``adapters``, ``top_k`` and ``ignore_eos`` are Loom's additions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "shape:0.7+french:0.3",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},
                                {"type": "text", "text": "All shapes?"},
                            ],
                        }
                    ],
                    "max_tokens": 32,
                    "temperature": 0,
                }
            ]
        }
    )

    messages: Items[ChatMessage] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: Items[str] | None = None
    reasoning_effort: str | None = None

    def unserved(self) -> tuple[str, ...]:
        asked_format = self.response_format and self.response_format.get("type") != "text"
        only_text = self.modalities in (None, ["text"])
        return (
            *super().unserved(),
            "tools",
            "tool_choice",
            "functions",
            *(("response_format",) if asked_format else ()),
            *(() if only_text else ("modalities",)),
        )

    @property
    def has_images(self) -> bool:
        return any(message.has_images for message in self.messages)

    def urls(self) -> list[str]:
        return [url for message in self.messages for url in message.urls()]

    def prompt(self, fetched: Mapping[str, bytes]) -> ChatPrompt:
        """``fetched``: the images at :meth:`urls`. Raises InvalidImage."""
        return ChatPrompt(messages=tuple(m.to_message(i, fetched) for i, m in enumerate(self.messages)))

    def sampling(self) -> Sampling:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs' set to true.", param="top_logprobs")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self.sampling_with(limit, (self.top_logprobs or 0) if self.logprobs else None)


def is_data_uri(url: str) -> bool:
    return url.startswith("data:")


def _image(url: str, where: str, fetched: Mapping[str, bytes]) -> bytes:
    return decode_data_uri(url, where) if is_data_uri(url) else fetched[url]


def decode_data_uri(url: str, where: str) -> bytes:
    """The bytes of a base64 ``data:`` URI. Raises InvalidImage."""
    head, comma, payload = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidImage(f"{where}: the data: URI must be base64, 'data:image/png;base64,…'.", param="messages")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"{where}: the image's base64 is damaged.", param="messages") from error


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[Token]) -> ChoiceLogprobs:
        return cls(
            content=[
                TokenLogprob(
                    token=token.text,
                    logprob=token.logprob or 0.0,
                    bytes=list(token.token_bytes),
                    top_logprobs=[
                        TopLogprob(token=a.text, logprob=a.logprob, bytes=list(a.token_bytes)) for a in token.top
                    ],
                )
                for token in tokens
            ]
        )


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
