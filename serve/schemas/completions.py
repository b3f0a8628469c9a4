"""``POST /v1/completions``: OpenAI's older form, text or token ids in."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_runtime.engine.protocol import Prompt, Sampling, TextPrompt, Token, TokenPrompt
from lora_runtime.errors import InvalidRequest
from serve.schemas.common import Items, SampledBody, Usage

MAX_PROMPTS = 16
DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SampledBody):
    """``prompt`` is a text, token ids, or a list of either."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "loom-zoo/base", "prompt": "Hello", "max_tokens": 8}]}
    )

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def unserved(self) -> tuple[str, ...]:
        one_best = self.best_of in (None, 1)
        return (*super().unserved(), "echo", "suffix", *(() if one_best else ("best_of",)))

    def prompts(self) -> list[Prompt]:
        raw = self.prompt
        if isinstance(raw, str):
            return [TextPrompt(text=raw)]
        if raw and isinstance(raw[0], int):
            return [TokenPrompt(token_ids=tuple(raw))]
        if not raw or len(raw) > MAX_PROMPTS:
            raise InvalidRequest(f"'prompt' must hold 1 to {MAX_PROMPTS} prompts, not {len(raw)}.", param="prompt")
        return [
            TextPrompt(text=one) if isinstance(one, str) else TokenPrompt(token_ids=tuple(one))  # type: ignore[arg-type]
            for one in raw
        ]

    def sampling(self) -> Sampling:
        return self.sampling_with(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]

    @classmethod
    def of(cls, tokens: list[Token], offset: int = 0) -> CompletionLogprobs:
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return cls(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob or 0.0 for token in tokens],
            top_logprobs=[{a.text: a.logprob for a in token.top} for token in tokens],
            text_offset=offsets,
        )


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionAnswer(BaseModel):
    """Also each chunk of a stream, as OpenAI has it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
