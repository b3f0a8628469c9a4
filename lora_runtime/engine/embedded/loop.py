"""The step loop: one thread that owns the model, the slots and the lanes.

Callers hand in jobs and cancellations; the thread admits, computes a step, delivers, repeats, and
sleeps when nothing runs. A job holds its slots from admission to its last token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from lora_runtime.engine import threads
from lora_runtime.engine.embedded.batch import Batch, StepPlan
from lora_runtime.engine.embedded.encodings import ImageCache
from lora_runtime.engine.embedded.runner import ModelRunner
from lora_runtime.engine.embedded.sampling import Chosen, choose
from lora_runtime.engine.embedded.sequence import Job, Sequence
from lora_runtime.engine.images import Patches
from lora_runtime.engine.protocol import Classification, FinishReason, TokenEvent
from lora_runtime.engine.routing import Signature
from lora_runtime.engine.slots import Lease, SlotTable
from lora_runtime.engine.text import TokenText
from lora_runtime.errors import DeadlineExceeded, EngineFault, LoomError, Overloaded, TurnTimeout
from lora_runtime.weights import AdapterWeights, Head, is_finite

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long the first in line waits for slots while requests behind it may still use slots."""

MAX_FAULTS = 3
"""Failed steps in a row after which the engine calls itself unhealthy."""


class StepLoop:
    """Runs jobs on ``runner``. ``submit`` and ``cancel`` may be called from any thread.

    ``is_core_wanted``: whether something computes beside the steps that they should leave a core to.
    """

    def __init__(
        self,
        runner: ModelRunner,
        token_text: TokenText,
        *,
        max_batched_tokens: int,
        max_slots: int,
        image_cache_bytes: int,
        num_threads: int,
        is_core_wanted: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = SlotTable(max_slots)
        self.counters: Counter[str] = Counter()
        self._runner = runner
        self._token_text = token_text
        self._batch: Batch[Sequence] = Batch(max_batched_tokens)
        self._images = ImageCache(image_cache_bytes)
        self._num_threads = num_threads
        self._is_core_wanted = is_core_wanted
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._live: set[Job] = set()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._is_ended = False
        self._blocked_since: float | None = None
        self._faults_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="loom-step-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after the current step; whatever runs or waits ends with EngineFault."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Raises EngineFault once the loop has ended."""
        self._post(lambda: self._accept(job))

    def cancel(self, job: Job) -> None:
        """End ``job`` without a further outcome; nothing happens if it is over."""
        with suppress(EngineFault):  # what has ended has dropped every job
            self._post(lambda: self._drop(job))

    def pin(self, version: str, weights: AdapterWeights, done: Future[None]) -> None:
        """Put ``version`` into a slot for good; ``done`` tells when, or why not. Raises as :meth:`submit`."""
        self._post(lambda: self._pin(version, weights, done))

    def unpin(self, version: str, done: Future[None]) -> None:
        """Let ``version`` be evicted again; ``done`` tells when. Raises as :meth:`submit`."""

        def unpin() -> None:
            self.slots.unpin(version)
            if done.set_running_or_notify_cancel():
                done.set_result(None)

        self._post(unpin)

    @property
    def is_healthy(self) -> bool:
        return self._thread.is_alive() and self._faults_in_a_row < MAX_FAULTS

    @property
    def num_running(self) -> int:
        return len(self._batch.running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_used_tokens(self) -> int:
        return sum(sequence.num_computed for sequence in tuple(self._batch.running))

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self._is_ended:
                raise EngineFault("The engine is shut down.")
            self._inbox.append(action)
            self._wake.notify()

    def _run(self) -> None:
        threads.compute_with(self._num_threads)
        sharing = threads.Sharing(self._num_threads if self._runner.device.type == "cpu" else 1)
        while self._collect():
            sharing.give_one_up(self._is_core_wanted())
            self._expire()
            self._admit()
            plan = self._batch.schedule()
            if plan.is_empty:
                self._refuse_blocked()
                continue
            try:
                self._step(plan)
                self._faults_in_a_row = 0
            except Exception as error:  # whatever fails in a step must not take the engine down
                self._faults_in_a_row += 1
                log.exception("a step failed")
                self._fail_plan(plan, error)
        with self._wake:
            self._is_ended = True
        for action in self._inbox:
            action()
        for job in list(self._live):
            self._fail(job, EngineFault("The engine was shut down while the request ran. Send it again."))

    def _collect(self) -> bool:
        """Take what callers handed in, sleeping while there is nothing to do. False: time to stop."""
        with self._wake:
            while not (self._inbox or self._batch.running or self._waiting or self._is_closing):
                self._wake.wait()
            actions, self._inbox = self._inbox, deque()
            is_closing = self._is_closing
        for action in actions:
            action()
        return not is_closing

    def _accept(self, job: Job) -> None:
        self._live.add(job)
        self._waiting.append(job)

    def _drop(self, job: Job) -> None:
        if not job.is_over:
            self.counters["cancelled"] += 1
            self._finish(job)

    def _expire(self) -> None:
        now = self._clock()
        for job in [job for job in self._live if job.deadline is not None and job.deadline <= now]:
            kind = TurnTimeout if job.lease is None else DeadlineExceeded
            self._fail(job, kind("The request ran out of time.", retry_after_s=1))

    def _admit(self) -> None:
        """First come first served. A job whose slots are all held lets others pass, for a while."""
        passed: list[Job] = []
        while self._waiting and self._runner.cache.num_free:
            job = self._waiting.popleft()
            if not self._may_enter(job, behind=bool(passed)) or not self._enter(job):
                passed.append(job)
        self._waiting.extendleft(reversed(passed))
        if not passed:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = self._clock()

    def _refuse_blocked(self) -> None:
        """Nothing runs, so nothing will free a slot for those who still wait: pinned adapters fill the engine."""
        for job in list(self._waiting):
            self._fail(job, Overloaded("Pinned adapters leave no slot for this request.", retry_after_s=30))

    def _may_enter(self, job: Job, *, behind: bool) -> bool:
        """Whether ``job`` may go before those it would pass: it must not take a slot they could use."""
        if not behind or not job.shares:
            return True
        is_patient = self._blocked_since is None or self._clock() - self._blocked_since < PATIENCE_S
        return is_patient and self.slots.holds_all(job.weights)

    def _enter(self, job: Job) -> bool:
        """Lease slots, fill them, take a lane for each choice that fits; False where slots are not to be had."""
        if job.lease is None:
            job.lease = self.slots.acquire(job.weights)
            if job.lease is None:
                return False
            try:
                self._fill(job.lease, job.weights)
            except Exception as error:  # one adapter's tensors must not take the loop down
                log.exception("an adapter could not be put into its slot")
                job.lease = None
                self._fail(job, EngineFault(f"An adapter of this request could not be loaded: {error}"))
                return True
        signature = job.signature()
        for sequence in job.sequences:
            if sequence.lane < 0 and self._runner.cache.num_free:
                sequence.lane = self._runner.cache.take()
                sequence.signature = signature
                sequence.num_prompt_tokens = len(job.prepared.ids)
                self._batch.join(sequence)
        return all(sequence.lane >= 0 for sequence in job.sequences)

    def _fill(self, lease: Lease, weights: Mapping[str, AdapterWeights]) -> None:
        """Carry out the lease's moves; on failure the lease is over and its slots are clear."""
        try:
            for move in lease.moves:
                self._runner.layers.fill(move.slot, weights[move.version])
        except Exception:
            for move in lease.moves:
                self._runner.layers.clear(move.slot)
            self.slots.abandon(lease)
            raise
        self.counters["slot_hits"] += len(lease.slots) - len(lease.moves)
        self.counters["slot_loads"] += len(lease.moves)
        self.counters["slot_evictions"] += sum(move.evicted is not None for move in lease.moves)

    def _pin(self, version: str, weights: AdapterWeights, done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        lease = self.slots.acquire([version])
        if lease is None:
            done.set_exception(
                Overloaded("Every slot is in use or pinned; try again shortly, or unpin one.", retry_after_s=1)
            )
            return
        try:
            self._fill(lease, {version: weights})
        except Exception as error:  # one adapter's tensors must not take the loop down
            log.exception("an adapter could not be put into its slot")
            done.set_exception(EngineFault(f"The adapter could not be loaded: {error}"))
            return
        self.slots.pin(version)
        self.slots.release(lease)
        done.set_result(None)

    def _step(self, plan: StepPlan[Sequence]) -> None:
        # Neighbours with equal targets make longer runs, and fewer of them.
        plan = replace(plan, decode=tuple(sorted(plan.decode, key=lambda s: s.signature)))
        self._encode_new_images(plan)
        hidden = self._runner.forward(plan)
        rows = _last_rows(plan)
        ready = list(zip(rows, self._batch.advance(plan), strict=True))
        self.counters["steps"] += 1
        self.counters["prompt_tokens"] += sum(span.stop - span.start for span in plan.prefill)
        for row, sequence in ready:
            if sequence.job.head is not None:
                self._classify(sequence.job, sequence.job.head, hidden[row])
        generating = [(row, sequence) for row, sequence in ready if sequence.job.head is None]
        if generating:
            self._choose_tokens(hidden, generating)

    def _choose_tokens(self, hidden: Tensor, rows: list[tuple[int, Sequence]]) -> None:
        index = torch.tensor([row for row, _ in rows], device=hidden.device)
        logits = self._runner.logits(hidden[index], [s.signature for _, s in rows])
        for (_, sequence), chosen in zip(rows, choose(logits, [s.sampler for _, s in rows]), strict=True):
            if chosen is None:
                self._fail(
                    sequence.job, EngineFault("The model gave no finite score for any token; check the adapter.")
                )
            elif not sequence.job.is_over:
                self._commit(sequence, chosen)

    def _commit(self, sequence: Sequence, chosen: Chosen) -> None:
        job = sequence.job
        sequence.generated.append(chosen.token_id)
        job.num_generated += 1
        self.counters["generated_tokens"] += 1
        is_eos = chosen.token_id in self._runner.eos_ids and not sequence.ignore_eos
        text = "" if is_eos else sequence.text.push(chosen.token_id)
        reason: FinishReason | None = None
        if is_eos or sequence.text.stopped:
            reason = "stop"
        elif len(sequence.generated) >= job.max_tokens:
            reason = "length"
        if reason is not None:
            text += sequence.text.flush()
            job.num_finished += 1
        is_last = job.num_finished == len(job.sequences)
        # Released before it is told: who has the last event may ask for the same slots at once.
        if is_last:
            self._finish(job)
        elif reason is not None:
            self._leave(sequence)
        job.deliver(
            TokenEvent(
                choice=sequence.choice,
                text=text,
                tokens=() if is_eos else (self._token_text.describe(chosen.token_id, chosen.logprob, chosen.top),),
                finish_reason=reason,
                usage=job.usage() if is_last else None,
            )
        )

    def _classify(self, job: Job, head: Head, hidden: Tensor) -> None:
        logits = self._runner.head_logits(hidden, head)
        if not is_finite(logits):
            self._fail(job, EngineFault("The classification head gave no finite scores; check the adapter."))
            return
        self._finish(job)
        job.deliver(
            Classification(
                labels=head.labels,
                probabilities=tuple(logits.softmax(-1).tolist()),
                logits=tuple(logits.tolist()),
                usage=job.usage(),
            )
        )

    def _encode_new_images(self, plan: StepPlan[Sequence]) -> None:
        """Encode what the plan's prompts show and the cache lacks; equal images of equal visual targets once."""
        new = [s for s in (span.sequence for span in plan.prefill) if s.job.prepared.images]
        new = [s for s in new if s.image_features is None]
        if not new:
            return
        found: dict[str, Tensor] = {}
        missing: dict[str, tuple[Patches, Signature]] = {}
        for sequence in new:
            for key, image in sequence.job.image_keys():
                cached = found.get(key)
                if cached is None and (cached := self._images.get(key)) is not None:
                    found[key] = cached
                if cached is not None:
                    self.counters["image_cache_hits"] += 1
                else:
                    missing[key] = (image, sequence.job.visual_signature())
        if missing:
            self.counters["image_encodings"] += len(missing)
            for key, features in zip(missing, self._runner.encode_images(list(missing.values())), strict=True):
                found[key] = features
                self._images.put(key, features)
        for sequence in new:
            sequence.image_features = torch.cat([found[key] for key, _ in sequence.job.image_keys()])

    def _leave(self, sequence: Sequence) -> None:
        if sequence.lane >= 0:
            self._batch.leave(sequence)
            self._runner.cache.give_back(sequence.lane)
            sequence.lane = -1
            sequence.image_features = None

    def _finish(self, job: Job) -> None:
        """Give back everything the job holds."""
        job.is_over = True
        self._live.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
        for sequence in job.sequences:
            self._leave(sequence)
        if job.lease is not None:
            self.slots.release(job.lease)
            job.lease = None

    def _fail(self, job: Job, error: LoomError) -> None:
        if not job.is_over:
            self._finish(job)
            job.deliver(error)

    def _fail_plan(self, plan: StepPlan[Sequence], error: Exception) -> None:
        jobs = {s.job for s in plan.decode} | {span.sequence.job for span in plan.prefill}
        for job in jobs:
            self._fail(
                job, EngineFault(f"A step of the engine failed: {type(error).__name__}. Send the request again.")
            )


def _last_rows(plan: StepPlan[Sequence]) -> list[int]:
    """Packed row of each sequence whose next token can be chosen, in the order of ``Batch.advance``."""
    rows = list(range(len(plan.decode)))
    end = len(plan.decode)
    for span in plan.prefill:
        end += span.stop - span.start
        if span.ends_prompt:
            rows.append(end - 1)
    return rows
