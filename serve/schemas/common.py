"""What several bodies share: strictness, adapters by field, sampling, and fields that would be ignored."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lora_runtime.engine.protocol import Sampling
from lora_runtime.errors import InvalidRequest
from serve.targets import NAME, Member

MAX_N = 16
MAX_STOPS = 4
MAX_STOP_LENGTH = 256


T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]
"""A list that is validated up to its first invalid item. Otherwise each one becomes an error, at 40 µs and more, and
invalid items do not count towards ``max_length``."""

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
"""As long as OpenAI allows."""


class Body(BaseModel):
    """A request body: unknown fields are errors, so that a typo never changes an answer silently."""

    model_config = ConfigDict(extra="forbid", strict=False)


class WeightedAdapter(Body):
    """One member of the field ``adapters``; ``id`` may carry a version: ``shape@3f9a12``."""

    id: str = Field(min_length=1, max_length=256, examples=["shape"])
    weight: float = Field(default=1.0, examples=[0.7])

    def member(self) -> Member:
        name, _, version = self.id.partition("@")
        if not NAME.fullmatch(name) or ("@" in self.id and not version):
            raise InvalidRequest(
                f"'{self.id[:128]}' is no adapter id; write 'name' or 'name@version'.", param="adapters"
            )
        return Member(name, version or None, self.weight)


class TargetedBody(Body):
    """Which model answers: ``model``, or ``adapters`` on top of the base."""

    model: str | None = Field(default=None, examples=["shape:0.7+french:0.3"])
    adapters: Items[WeightedAdapter] | None = Field(default=None, max_length=64)
    user: str | None = Field(default=None, max_length=512)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    safety_identifier: str | None = Field(default=None, max_length=512)

    @property
    def has_images(self) -> bool:
        return False

    def members(self) -> list[Member] | None:
        return None if self.adapters is None else [adapter.member() for adapter in self.adapters]


class SampledBody(TargetedBody):
    """Sampling and output options that chat and completions share.

    Fields of OpenAI's API that do not change an answer here are accepted; those that would, and are
    not served, are refused where they ask for anything but their default.
    """

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MAX_N)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | Items[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    service_tier: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _refuse_unserved(self) -> SampledBody:
        for name in self.unserved():
            value = getattr(self, name)
            if value not in (None, 0, False, {}, [], "none", "auto") or (name == "store" and value):
                raise ValueError(f"'{name}' is not served; leave it out")
        return self

    def unserved(self) -> tuple[str, ...]:
        return ("frequency_penalty", "presence_penalty", "logit_bias", "store")

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stops = [stop for stop in stops if stop]
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
            raise InvalidRequest(
                f"'stop' takes at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters.", param="stop"
            )
        return tuple(stops)

    def sampling_with(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """OpenAI's defaults where nothing is said."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=self.stops(),
            logprobs=logprobs,
            n=self.n or 1,
            ignore_eos=self.ignore_eos,
        )

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


SampledBody.model_rebuild()


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorDetail(BaseModel):
    """OpenAI's error: ``type`` is a class of errors, ``code`` the exact one."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


JsonObject = dict[str, Any]
