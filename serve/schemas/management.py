"""Models, adapters and classification."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_runtime.engine.protocol import ChatPrompt, Prompt, TextPrompt
from serve.schemas.chat import ChatMessage
from serve.schemas.common import Body, TargetedBody, Usage


class Model(BaseModel):
    """An entry of ``GET /v1/models``. ``parent`` is the base of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loom"
    parent: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class RegisterRequest(Body):
    """Register the PEFT adapter in the folder ``path`` (on the serving machines) under ``name``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "support", "path": "/adapters/support"}]})

    name: str = Field(min_length=1, max_length=128)
    path: str = Field(min_length=1, max_length=4096)


class Adapter(BaseModel):
    """A registered adapter; ``info`` is what its examination found (ranks, saved modules, heads, bytes)."""

    id: str
    object: Literal["adapter"] = "adapter"
    version: str
    created: datetime
    info: dict[str, Any]


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Adapter]


class Deleted(BaseModel):
    id: str
    object: str = "adapter.deleted"
    deleted: bool = True


class ClassifyBody(TargetedBody):
    """One input, as ``messages`` or plain ``input``; ``head`` where the target has several."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "warmth", "messages": [{"role": "user", "content": "Warm or cold at the top left?"}]}
            ]
        }
    )

    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=1024)
    input: str | None = None
    head: str | None = Field(default=None, max_length=128)

    @model_validator(mode="after")
    def _one_input(self) -> ClassifyBody:
        if (self.messages is None) == (self.input is None):
            raise ValueError("give either 'messages' or 'input'")
        return self

    def prompt(self) -> Prompt:
        if self.messages is None:
            return TextPrompt(text=self.input or "")
        return ChatPrompt(messages=tuple(m.to_message(i) for i, m in enumerate(self.messages)))


class LabelScore(BaseModel):
    label: str
    probability: float
    logit: float


class ClassifyResult(BaseModel):
    """``label`` is the likeliest; ``scores`` has every label in the head's order."""

    index: int = 0
    label: str
    probability: float
    scores: list[LabelScore]


class ClassifyAnswer(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassifyResult]
    usage: Usage
