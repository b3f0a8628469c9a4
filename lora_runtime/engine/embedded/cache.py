"""Keys and values of the running requests, and the attention that reads them.

Each running request owns a *lane*: room for ``max_len`` tokens in every layer. Lanes bound the
memory at start-up, make joining and leaving free, and let decode read all running lanes as one
view, without a copy, while they are dense (free lanes are taken lowest first).

Shape legend: L lanes, K key/value heads, Q query heads, G query heads per key/value head,
S cached tokens, T packed tokens of a step, D head width, B decoding requests.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ATTENTION_NAME = "loom_lanes"


class LaneCache:
    """Storage for ``num_lanes`` requests of at most ``max_len`` tokens, and who owns which lane."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_lanes: int,
        num_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_lanes, num_heads, max_len, head_dim)
        self.keys_LKSD = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values_LKSD = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.num_lanes = num_lanes
        self.max_len = max_len
        self._free = list(range(num_lanes))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free lane. Raises IndexError when there is none."""
        return heapq.heappop(self._free)

    def give_back(self, lane: int) -> None:
        heapq.heappush(self._free, lane)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, stop) of the step continue ``lane``, which holds ``past`` tokens already."""

    start: int
    stop: int
    lane: int
    past: int


class LaneStep:
    """One step's view of the cache: where new keys go and what each token may see.

    The first ``len(decode_lanes)`` packed tokens are single new tokens of those lanes; ``chunks``
    cover the rest.
    """

    def __init__(
        self, cache: LaneCache, decode_lanes: Sequence[int], decode_past: Sequence[int], chunks: Sequence[Chunk]
    ) -> None:
        device = cache.keys_LKSD[0].device
        self._cache = cache
        self._chunks = tuple(chunks)
        self.num_decode = len(decode_lanes)
        self._lanes = torch.tensor(decode_lanes, device=device, dtype=torch.int64)
        self._past = torch.tensor(decode_past, device=device, dtype=torch.int64)
        self._longest = max(decode_past, default=0) + 1
        # Reading all lanes up to the highest is a view; picking lanes is a copy. A few idle lanes
        # in between cost less than the copy.
        self._num_viewed = max(decode_lanes, default=-1) + 1
        self._is_view = self._num_viewed <= 2 * self.num_decode
        past = self._past
        if self._is_view:
            past = torch.zeros(self._num_viewed, device=device, dtype=torch.int64)
            past[self._lanes] = self._past
        self._decode_mask_B11S = (torch.arange(self._longest, device=device) <= past[:, None])[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """``query`` (1, Q, T, D), ``key`` and ``value`` (1, K, T, D), rotated; returns (1, T, Q, D)."""
        output = torch.empty_like(query)
        if self.num_decode:
            self._attend_decode(layer, query, key, value, scaling, output)
        for chunk in self._chunks:
            self._attend_chunk(layer, chunk, query, key, value, scaling, output)
        return output.transpose(1, 2)

    def _attend_decode(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        keys, values = self._cache.keys_LKSD[layer], self._cache.values_LKSD[layer]
        count, num_kv, width = self.num_decode, key.shape[1], key.shape[3]
        keys[self._lanes, :, self._past] = key[0, :, :count].transpose(0, 1)
        values[self._lanes, :, self._past] = value[0, :, :count].transpose(0, 1)
        # One new token per request: the query heads that share a key head stand where a sequence
        # of queries would, so grouped heads need no repeated keys.
        grouped_BKGD = query[0, :, :count].transpose(0, 1).reshape(count, num_kv, -1, width)
        if self._is_view:
            by_lane = grouped_BKGD.new_zeros(self._num_viewed, *grouped_BKGD.shape[1:])
            by_lane[self._lanes] = grouped_BKGD
            grouped_BKGD = by_lane
            keys, values = keys[: self._num_viewed], values[: self._num_viewed]
            keys, values = keys[:, :, : self._longest], values[:, :, : self._longest]
        else:
            keys = keys[:, :, : self._longest][self._lanes]
            values = values[:, :, : self._longest][self._lanes]
        attended = scaled_dot_product_attention(
            grouped_BKGD, keys, values, attn_mask=self._decode_mask_B11S, scale=scaling
        )
        if self._is_view:
            attended = attended[self._lanes]
        output[0, :, :count] = attended.reshape(count, -1, width).transpose(0, 1)

    def _attend_chunk(
        self, layer: int, chunk: Chunk, query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor
    ) -> None:
        keys, values = self._cache.keys_LKSD[layer][chunk.lane], self._cache.values_LKSD[layer][chunk.lane]
        tokens = slice(chunk.start, chunk.stop)
        end = chunk.past + chunk.stop - chunk.start
        keys[:, chunk.past : end] = key[0, :, tokens]
        values[:, chunk.past : end] = value[0, :, tokens]
        mask = None
        if chunk.past:
            seen = torch.arange(end, device=keys.device)
            mask = seen <= torch.arange(chunk.past, end, device=keys.device)[:, None]
        output[:, :, tokens] = scaled_dot_product_attention(
            query[:, :, tokens],
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def lane_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    lane_step: LaneStep,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over lanes; ``lane_step`` comes through the model's keyword arguments."""
    return lane_step.attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


def register_attention() -> None:
    """Make ``lane_attention`` known to transformers under :data:`ATTENTION_NAME`. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, lane_attention)
