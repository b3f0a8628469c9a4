"""Ray Serve's request router for engines: requests go to replicas that hold their adapters (``affinity.py``)."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.affinity import LOAD_COST, Candidate, ranked

PROMISE_S = 0.5
"""How long a choice counts as a request of its replica at most, if nothing is heard of it."""
OTHERS_S = 1.0
"""How long what a replica told of other routers' requests is believed."""


class AdapterRouter(RequestRouter):
    """Reads the wanted adapters from the call's first argument, and what replicas hold from what they told.

    Without FIFOMixin: the replica chosen for a request is for that request.

    A replica's load is the less of two numbers that can be too high. In Ray's cache of queue lengths, what a replica
    tells takes the place of what was counted, and of requests that ended between the two some are never subtracted:
    after a burst an idle replica seems busy for ten seconds. What is counted here takes requests of this router that
    ended a moment ago, and that the replica still counts, for others', for one second.
    """

    queue_len_response_deadline_s = 0.5
    """How long a replica that was not asked lately may take to say how much it has to do, before the next best is
    asked. Ray's own 0.1 s is less than a busy machine needs, and loading an adapter elsewhere costs more."""

    def initialize_state(self, *, load_cost: float = LOAD_COST, **_: Any) -> None:
        """Called by Ray with ``request_router_kwargs``."""
        self._load_cost = load_cost
        self._promised: dict[str, tuple[str, float]] = {}
        self._running: Counter[str] = Counter()
        self._others: dict[str, tuple[int, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas one by one, best first; Ray takes the first that has room, and asks again later if none has."""
        if pending_request is None:
            return [candidate_replicas]
        # Without it Ray asks again at once, for ever, while all replicas are full.
        pending_request.routing_context.should_backoff = True
        call = pending_request.metadata.internal_request_id
        promised = self._num_promised(without=call)
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))  # equals share what has no home
        by_id = {replica.replica_id.unique_id: replica for replica in shuffled}
        candidates = [
            Candidate(
                id=identifier,
                held=replica.multiplexed_model_ids,
                load=self._load_of(replica.replica_id) + promised[identifier],
            )
            for identifier, replica in by_id.items()
        ]
        best = ranked(wanted_by(pending_request), candidates, self._load_cost)
        if best:
            self._promised[call] = (best[0].id, time.monotonic())
        return [[by_id[candidate.id]] for candidate in best]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """From now on Ray counts it itself."""
        self._promised.pop(pending_request.metadata.internal_request_id, None)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """A request of this router is on its way."""
        super().on_send_request(replica_id)
        self._running[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request of this router ended, however it did."""
        super().on_request_completed(replica_id, internal_request_id)
        left = self._running[replica_id.unique_id] - 1
        if left > 0:
            self._running[replica_id.unique_id] = left
        else:
            del self._running[replica_id.unique_id]

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """A replica says how many requests it has; those that are not of this router are others'."""
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        others = max(0, num_ongoing_requests - self._running[replica_id.unique_id])
        self._others[replica_id.unique_id] = (others, time.monotonic())

    def _load_of(self, replica_id: ReplicaID) -> int:
        others, at = self._others.get(replica_id.unique_id, (0, 0.0))
        counted = self._running[replica_id.unique_id] + (others if time.monotonic() - at < OTHERS_S else 0)
        cached = self.replica_queue_len_cache.get(replica_id)
        return counted if cached is None else min(cached, counted)

    def _num_promised(self, *, without: str) -> Counter[str]:
        """By replica, choices whose requests are not sent yet: many that come at once would all see the same queues."""
        now = time.monotonic()
        self._promised = {
            call: (replica, at)
            for call, (replica, at) in self._promised.items()
            if call != without and now - at < PROMISE_S
        }
        return Counter(replica for replica, _ in self._promised.values())


def wanted_by(request: PendingRequest) -> frozenset[str]:
    """The versions that a call needs in slots: of a generation or a classification, none otherwise."""
    first = request.args[0] if request.args else None
    adapters = getattr(first, "adapters", ())
    return frozenset(ref.version for ref in adapters if ref.weight != 0)
