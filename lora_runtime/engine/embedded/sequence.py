"""What runs: one choice of one request, and the request it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_runtime.engine.embedded.encodings import ImageCache
from lora_runtime.engine.embedded.sampling import RowSampler
from lora_runtime.engine.images import Patches
from lora_runtime.engine.prompts import Prepared
from lora_runtime.engine.protocol import Classification, TokenEvent, Usage
from lora_runtime.engine.routing import Signature
from lora_runtime.engine.slots import Lease
from lora_runtime.engine.text import TextStream
from lora_runtime.weights import AdapterWeights, Head

Outcome = TokenEvent | Classification | Exception


@dataclass(slots=True, eq=False)
class Job:
    """One request inside the engine.

    ``weights`` by version, ``shares`` (version, weight) with non-zero weights. ``head`` is set for a
    classification. ``deliver`` hands outcomes to the caller and is safe to call from the step thread.
    """

    request_id: str
    prepared: Prepared
    weights: Mapping[str, AdapterWeights]
    shares: tuple[tuple[str, float], ...]
    deliver: Callable[[Outcome], None]
    deadline: float | None
    max_tokens: int
    head: Head | None = None
    sequences: list[Sequence] = field(default_factory=list)
    lease: Lease | None = None
    num_finished: int = 0
    num_generated: int = 0
    is_over: bool = False
    was_cold: bool = False

    def signature(self) -> Signature:
        """The target over slots; only under a lease."""
        assert self.lease is not None
        return tuple(sorted((self.lease.slots[version], weight) for version, weight in self.shares))

    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prepared.ids), completion_tokens=self.num_generated, was_cold=self.was_cold)

    def visual_signature(self) -> Signature:
        """The part of the target that an image's encoding depends on, over slots."""
        assert self.lease is not None
        return tuple(sorted((self.lease.slots[version], weight) for version, weight in self._visual_shares()))

    def image_keys(self) -> list[tuple[str, Patches]]:
        """Each image with what identifies its encoding: content and visual target."""
        shares = self._visual_shares()
        return [(ImageCache.key(image, shares), image) for image in self.prepared.images]

    def _visual_shares(self) -> tuple[tuple[str, float], ...]:
        return tuple(sorted((v, w) for v, w in self.shares if self.weights[v].touches_vision))


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice. ``image_features`` (image tokens, hidden) is set before its first step."""

    job: Job
    choice: int
    sampler: RowSampler
    text: TextStream
    ignore_eos: bool
    lane: int = -1
    signature: Signature = ()
    num_prompt_tokens: int = 0
    num_computed: int = 0
    generated: list[int] = field(default_factory=list)
    image_features: Tensor | None = None

    @property
    def position_of_next(self) -> int:
        """M-RoPE position of the last generated token, the one that the next step feeds."""
        return self.job.prepared.next_position + len(self.generated) - 1
