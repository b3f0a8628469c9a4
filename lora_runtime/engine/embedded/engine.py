"""The embedded engine: prepares requests off the step thread, hands them to the loop, streams what comes back."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from lora_runtime.engine import threads
from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.host import HostCache
from lora_runtime.engine.embedded.loop import StepLoop
from lora_runtime.engine.embedded.runner import ModelRunner
from lora_runtime.engine.embedded.sampling import RowSampler
from lora_runtime.engine.embedded.sequence import Job, Outcome, Sequence
from lora_runtime.engine.entry import AdapterReader, Admission, room_for
from lora_runtime.engine.heads import select_head
from lora_runtime.engine.images import ImageProcessor
from lora_runtime.engine.prompts import Prepared, PromptProcessor
from lora_runtime.engine.protocol import (
    AdapterInfo,
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Prompt,
    Sampling,
    TokenEvent,
    summed,
)
from lora_runtime.engine.text import TextStream, TokenText
from lora_runtime.errors import DeadlineExceeded, EngineFault, InvalidRequest
from lora_runtime.weights import AdapterWeights, Head

PREPARE_THREADS = 4


class EmbeddedEngine:
    """Implements :class:`lora_runtime.engine.protocol.Engine` on plain torch. Bound to one event loop."""

    def __init__(self, config: EmbeddedConfig) -> None:
        """Loads the base. Raises EngineFault for a base it cannot serve."""
        self._config = config
        self._runner = threads.with_a_passing_team(lambda: ModelRunner(config))
        images = ImageProcessor(config.base_path, max_pixels=config.max_image_pixels)
        self._prompts = PromptProcessor(
            config.base_path,
            images,
            max_images=config.max_images,
            rope_index=self._runner.model.model.get_rope_index,
        )
        self._executor = ThreadPoolExecutor(
            PREPARE_THREADS, thread_name_prefix="loom-prepare", initializer=threads.compute_alone
        )
        self._counters: Counter[str] = Counter()
        self._reader = AdapterReader(
            self._runner.layout, config.base_path, config.max_materialised_bytes, self._runner.dtype
        )
        self._host = HostCache(self._reader, self._executor, config.host_cache_bytes, self._count_load)
        self._loop = StepLoop(
            self._runner,
            TokenText(self._prompts.tokenizer),
            max_batched_tokens=config.max_batched_tokens,
            max_slots=config.max_slots,
            image_cache_bytes=config.image_cache_bytes,
            num_threads=config.num_threads or threads.available(),
            is_core_wanted=lambda: self._host.is_reading,
        )
        self._admitted = Admission(config.max_waiting + config.max_batch_size)
        self._is_started = False
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            kind="embedded",
            device=str(self._runner.device),
            dtype=str(self._runner.dtype).removeprefix("torch."),
            max_model_len=self._runner.max_model_len,
            max_batch_size=self._config.max_batch_size,
            max_slots=self._config.max_slots,
        )

    async def start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._loop.start()

    async def close(self) -> None:
        self._is_closed = True
        await asyncio.to_thread(self._loop.close)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def examine(self, path: str) -> AdapterInfo:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._reader.examine, path)

    async def check(self, prompt: Prompt) -> None:
        await self._prompts.check(prompt, self._runner.max_model_len)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if request.sampling.n > self._config.max_batch_size:
            raise InvalidRequest(
                f"n is {request.sampling.n}; this engine runs at most {self._config.max_batch_size} choices at once.",
                param="n",
            )
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        with self._admission():
            deadline = _deadline(request.timeout_s)
            is_ready = self._loop.slots.holds_all(summed(request.adapters))
            prepared, weights = await self._prepare(request, deadline)
            max_tokens = room_for(len(prepared.ids), request.sampling.max_tokens, self._runner.max_model_len)
            job = self._job(request.request_id, prepared, request.adapters, weights, outcomes, deadline)
            job.max_tokens, job.was_cold = max_tokens, not is_ready
            job.sequences = [self._sequence(job, request.sampling, choice) for choice in range(request.sampling.n)]
            self._loop.submit(job)
            try:
                while True:
                    event = await outcomes.get()
                    if isinstance(event, Exception):
                        raise event
                    assert isinstance(event, TokenEvent)
                    yield event
                    if event.usage is not None:
                        return
            finally:
                self._loop.cancel(job)

    async def classify(self, request: ClassifyRequest) -> Classification:
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        with self._admission():
            deadline = _deadline(request.timeout_s)
            is_ready = self._loop.slots.holds_all(summed(request.adapters))
            prepared, weights = await self._prepare(request, deadline)
            room_for(len(prepared.ids), 0, self._runner.max_model_len)
            head = select_head(request.adapters, weights, request.head)
            job = self._job(request.request_id, prepared, request.adapters, weights, outcomes, deadline, head)
            job.was_cold = not is_ready
            job.sequences = [self._sequence(job, Sampling(temperature=0.0), 0)]
            self._loop.submit(job)
            try:
                outcome = await outcomes.get()
            finally:
                self._loop.cancel(job)
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Classification)
        return outcome

    async def prefetch(self, adapter: AdapterRef) -> None:
        await self._host.get(adapter)

    async def pin(self, adapter: AdapterRef) -> None:
        with self._admission():
            weights = await self._host.get(adapter)
            done: Future[None] = Future()
            self._loop.pin(adapter.version, weights, done)
            await asyncio.wrap_future(done)

    async def unpin(self, version: str) -> None:
        done: Future[None] = Future()
        self._loop.unpin(version, done)
        await asyncio.wrap_future(done)

    def stats(self) -> EngineStats:
        cache = self._runner.cache
        return EngineStats(
            running=self._loop.num_running,
            waiting=self._loop.num_waiting,
            resident=self._loop.slots.resident,
            held_slots=self._loop.slots.num_held,
            kv_used_tokens=self._loop.kv_used_tokens,
            kv_capacity_tokens=cache.num_lanes * cache.max_len,
            counters={**self._counters, **self._loop.counters},
        )

    async def check_health(self) -> None:
        if self._is_started and not self._loop.is_healthy:
            raise EngineFault("The engine's step loop has failed; this replica must be replaced.")

    @contextmanager
    def _admission(self) -> Iterator[None]:
        """Counts a request in while it is inside the engine."""
        if self._is_closed or not self._is_started:
            raise EngineFault("The engine is not running.")
        with self._admitted.entered():
            yield

    async def _prepare(
        self, request: GenerateRequest | ClassifyRequest, deadline: float | None
    ) -> tuple[Prepared, dict[str, AdapterWeights]]:
        """Tokenize and read adapters at once, off the event loop and before any slot is taken."""
        refs = [ref for ref in request.adapters if ref.weight != 0]
        self._loop.slots.check_fits(ref.version for ref in refs)
        loop = asyncio.get_running_loop()
        preparing = loop.run_in_executor(
            self._executor, self._prompts.prepare, request.prompt, self._runner.max_model_len
        )
        try:
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0)):
                reading = asyncio.gather(*(self._host.get(ref) for ref in refs))
                prepared, weights = await asyncio.gather(preparing, reading)
        except TimeoutError as error:
            raise DeadlineExceeded("The request ran out of time while it was prepared.", retry_after_s=1) from error
        return prepared.scoped(request.cache_scope), {
            ref.version: found for ref, found in zip(refs, weights, strict=True)
        }

    def _job(
        self,
        request_id: str,
        prepared: Prepared,
        adapters: tuple[AdapterRef, ...],
        weights: Mapping[str, AdapterWeights],
        outcomes: asyncio.Queue[Outcome],
        deadline: float | None,
        head: Head | None = None,
    ) -> Job:
        loop = asyncio.get_running_loop()

        def deliver(outcome: Outcome) -> None:
            with suppress(RuntimeError):  # the caller's event loop is closed: nobody listens any more
                loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        shares = summed(adapters)
        return Job(
            request_id=request_id,
            prepared=prepared,
            weights={version: found for version, found in weights.items() if version in shares},
            shares=tuple(sorted(shares.items())),
            deliver=deliver,
            deadline=deadline,
            max_tokens=0,
            head=head,
        )

    def _sequence(self, job: Job, sampling: Sampling, choice: int) -> Sequence:
        return Sequence(
            job=job,
            choice=choice,
            sampler=RowSampler(sampling, choice),
            text=TextStream(self._prompts.tokenizer.backend_tokenizer, sampling.stop),
            ignore_eos=sampling.ignore_eos,
        )

    def _count_load(self, seconds: float) -> None:
        self._counters["adapter_loads"] += 1
        self._counters["adapter_load_seconds"] += seconds  # type: ignore[assignment]  # Counter holds floats as well


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s
