"""Encoded images, kept so that the same picture is encoded once for all targets that see it alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor

from lora_runtime.engine.images import Patches


class ImageCache:
    """Encoded images by content and visual target, least recently used out first beyond ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    @staticmethod
    def key(patches: Patches, visual_shares: tuple[tuple[str, float], ...]) -> str:
        """Adapters without a visual part share the base's encoding; identity is content, never a name."""
        return hashlib.sha256(repr((patches.digest, visual_shares)).encode()).hexdigest()

    def get(self, key: str) -> Tensor | None:
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        return found

    def put(self, key: str, features: Tensor) -> None:
        if key in self._held:
            return
        features = features.clone()  # a slice of a batch would keep the whole batch alive
        self._held[key] = features
        self._num_bytes += features.numel() * features.element_size()
        while self._num_bytes > self._max_bytes and self._held:
            _, oldest = self._held.popitem(last=False)
            self._num_bytes -= oldest.numel() * oldest.element_size()
