"""Models, adapters and classification."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_runtime.engine.protocol import ChatPrompt, Prompt, TextPrompt
from serve.registry.records import AuditRecord
from serve.schemas.chat import ChatMessage
from serve.schemas.common import Body, Items, TargetedBody, Usage


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
    """Register the PEFT adapter at ``path``, a folder of the serving machines or an address, under ``name``.

    Other content than before becomes a further version. ``activate`` false: the bare name goes on meaning the
    version it means; the new one is served under ``name@version``, or an alias.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "support", "path": "/adapters/support"}, {"name": "tone", "path": "s3://ours/tone"}]
        }
    )

    name: str = Field(min_length=1, max_length=128)
    path: str = Field(min_length=1, max_length=4096)
    activate: bool = True


class LoadLoraRequest(Body):
    """vLLM's request to load an adapter. ``load_inplace``: other content may take a known name."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoraRequest(Body):
    """vLLM's request to unload an adapter; ``lora_int_id`` means nothing here."""

    lora_name: str = Field(min_length=1, max_length=128)
    lora_int_id: int | None = None


class AliasRequest(Body):
    """What an alias is to mean: a version, the beginning of one, or another alias. ``pinned``: whether every engine
    keeps it in a slot; as it was if not given."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "3f9a12", "pinned": True}]})

    version: str = Field(min_length=1, max_length=128)
    pinned: bool | None = None


class Adapter(BaseModel):
    """A registered adapter. ``version`` is what its bare name means, ``info`` what the examination of that found
    (method, ranks, saved modules, heads, bytes), ``aliases`` the versions by movable name, ``pinned`` the
    aliases that engines keep in a slot."""

    id: str
    object: Literal["adapter"] = "adapter"
    version: str
    created: datetime
    info: dict[str, Any]
    aliases: dict[str, str]
    pinned: list[str]
    num_versions: int


class AdapterVersion(BaseModel):
    """Content registered under an adapter's name; ``id`` is its sha256, ``number`` counts from 1, and
    ``source`` is where its registration took it from."""

    id: str
    object: Literal["adapter.version"] = "adapter.version"
    adapter: str
    number: int
    created: datetime
    source: str
    aliases: list[str]
    info: dict[str, Any]


class AdapterVersionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterVersion]


class AuditEntry(BaseModel):
    """One change of the registry."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, Any]

    @classmethod
    def of(cls, record: AuditRecord) -> AuditEntry:
        return cls(
            id=record.id,
            at=record.at,
            actor=record.actor,
            action=record.action,
            subject=record.subject,
            details=dict(record.details),
        )


class AuditList(BaseModel):
    """Newest first. ``has_more``: ask again with ``before`` the last one's id."""

    object: Literal["list"] = "list"
    data: list[AuditEntry]
    has_more: bool


class Collected(BaseModel):
    """Versions that were taken out of the store."""

    object: Literal["store.collected"] = "store.collected"
    versions: list[str]


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

    messages: Items[ChatMessage] | None = Field(default=None, min_length=1, max_length=1024)
    input: str | None = None
    head: str | None = Field(default=None, max_length=128)

    @model_validator(mode="after")
    def _one_input(self) -> ClassifyBody:
        if (self.messages is None) == (self.input is None):
            raise ValueError("give either 'messages' or 'input'")
        return self

    @property
    def has_images(self) -> bool:
        return any(message.has_images for message in self.messages or ())

    def urls(self) -> list[str]:
        return [url for message in self.messages or () for url in message.urls()]

    def prompt(self, fetched: Mapping[str, bytes]) -> Prompt:
        """``fetched``: the images at :meth:`urls`. Raises InvalidImage."""
        if self.messages is None:
            return TextPrompt(text=self.input or "")
        return ChatPrompt(messages=tuple(m.to_message(i, fetched) for i, m in enumerate(self.messages)))


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
