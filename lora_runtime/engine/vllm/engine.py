"""The engine on vLLM: prompts and images are prepared here, slots are leased here, vLLM batches and computes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Any

import torch

from lora_runtime.checkpoint import AdapterOutline
from lora_runtime.engine import threads
from lora_runtime.engine.entry import AdapterReader, Admission, dtype_named, room_for
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
    TokenEvent,
    Usage,
    summed,
)
from lora_runtime.engine.routing import Signature
from lora_runtime.engine.text import TokenText
from lora_runtime.engine.vllm import names, startup
from lora_runtime.engine.vllm.binding import Binding
from lora_runtime.engine.vllm.config import VllmConfig
from lora_runtime.engine.vllm.probe import prove
from lora_runtime.engine.vllm.residency import Residency
from lora_runtime.engine.vllm.translate import Events, engine_input, sampling_params
from lora_runtime.errors import DeadlineExceeded, EngineFault, InvalidRequest, unpacked
from lora_runtime.layout import BaseLayout

PREPARE_THREADS = 4
MAX_PAUSE_S = 0.05
"""Between questions whether an adapter is read."""


class VllmEngine:
    """Implements :class:`lora_runtime.engine.protocol.Engine`. Bound to one event loop."""

    def __init__(self, config: VllmConfig) -> None:
        """Raises EngineFault for a vLLM whose internals are not known."""
        names.check_version()
        self._config = config
        self._layout = BaseLayout.from_config(config.base_path)
        self._reader = self._reader_in(dtype_named(config.known_dtype))
        images = ImageProcessor(config.base_path, max_pixels=config.max_image_pixels)
        self._prompts = PromptProcessor(
            config.base_path, images, max_images=config.max_images, rope_index=_no_positions
        )
        self._images = images
        self._token_text = TokenText(self._prompts.tokenizer)
        self._executor = ThreadPoolExecutor(
            PREPARE_THREADS, thread_name_prefix="loom-prepare", initializer=threads.compute_alone
        )
        self._known: dict[str, AdapterOutline] = {}
        self._residency = Residency(config.max_slots, self._fill, self._clear)
        self._next_id = itertools.count(1)
        self._next_number = itertools.count(1)
        self._bound: dict[str, tuple[int, int]] = {}
        self._counters: Counter[str] = Counter()
        self._admitted = Admission(config.max_waiting + config.max_batch_size)
        self._tokens_inside: Counter[str] = Counter()
        self._starting: asyncio.Task[None] | None = None
        self._engine: Any = None
        self._eos_ids: frozenset[int] = frozenset()
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        model = self._engine.vllm_config.model_config
        return EngineInfo(
            kind="vllm",
            device=str(self._engine.vllm_config.device_config.device_type),
            dtype=str(model.dtype).removeprefix("torch."),
            max_model_len=model.max_model_len,
            max_batch_size=self._config.max_batch_size,
            max_slots=self._config.max_slots,
        )

    async def start(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def close(self) -> None:
        self._is_closed = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _start(self) -> None:
        engine = await asyncio.to_thread(startup.start, self._config)
        try:
            for step in ("loom_check", "loom_compile"):
                wrong = [message for message in await engine.collective_rpc(step) if message is not None]
                if wrong:
                    raise EngineFault(wrong[0])
            await prove(engine, self._layout, slot=0)
        except BaseException:
            await asyncio.to_thread(engine.shutdown)
            raise
        stored = engine.vllm_config.model_config.try_get_generation_config().get("eos_token_id")
        found = [*(stored if isinstance(stored, list) else [stored]), self._prompts.tokenizer.eos_token_id]
        self._eos_ids = frozenset(token for token in found if token is not None)
        self._reader = self._reader_in(engine.vllm_config.model_config.dtype)
        self._engine = engine

    def _reader_in(self, dtype: torch.dtype | None) -> AdapterReader:
        return AdapterReader(self._layout, self._config.base_path, self._config.max_materialised_bytes, dtype)

    async def examine(self, path: str) -> AdapterInfo:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._reader.examine, path)

    async def check(self, prompt: Prompt) -> None:
        await self._prompts.check(prompt, self.info.max_model_len)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        if request.sampling.n > self._config.max_batch_size:
            raise InvalidRequest(
                f"n is {request.sampling.n}; this engine runs at most {self._config.max_batch_size} choices at once.",
                param="n",
            )
        deadline = _deadline(request.timeout_s)
        with self._admission():
            async with AsyncExitStack() as stack:
                async with _until(deadline):
                    prepared, known = await self._prepare(request)
                    room = room_for(len(prepared.ids), request.sampling.max_tokens, self.info.max_model_len)
                    shares = summed(request.adapters)
                    was_cold = not self._residency.is_ready(shares)
                    slots = await stack.enter_async_context(self._residency.held(_held(request.adapters, shares)))
                binding = Binding(signature=_signature(slots, shares))
                events = Events(self._token_text, len(prepared.ids), self._eos_ids, was_cold=was_cold)
                parameters = sampling_params(request.sampling, room)
                stream = self._outputs(prepared, _visual(known, shares), shares, binding, parameters)
                outputs = await stack.enter_async_context(aclosing(stream))
                while not events.is_over:
                    async with _until(deadline):
                        output = await anext(outputs)
                    for event in events.of(output):
                        yield event

    async def classify(self, request: ClassifyRequest) -> Classification:
        with self._admission():
            async with _until(_deadline(request.timeout_s)):
                return await self._classify(request)

    async def _classify(self, request: ClassifyRequest) -> Classification:
        prepared, known = await self._prepare(request)
        room_for(len(prepared.ids), 1, self.info.max_model_len)
        head = select_head(request.adapters, known, request.head)
        shares = summed(request.adapters)
        parameters = names.SamplingParams(max_tokens=1, temperature=0.0, logprobs=len(head.labels), ignore_eos=True)
        found: Mapping[int, Any] = {}
        was_cold = not self._residency.is_ready(shares)
        async with self._residency.held(_held(request.adapters, shares)) as slots:
            binding = Binding(signature=_signature(slots, shares), head=head.name)
            stream = self._outputs(prepared, _visual(known, shares), shares, binding, parameters)
            async with aclosing(stream) as outputs:
                async for output in outputs:
                    found = output.outputs[0].logprobs[0]
        scores = tuple(found[i].logprob if i in found else -math.inf for i in range(len(head.labels)))
        if not all(math.isfinite(score) for score in scores):
            raise EngineFault("The classification head gave no finite scores; check the adapter.")
        return Classification(
            labels=head.labels,
            probabilities=tuple(math.exp(score) for score in scores),
            logits=scores,
            usage=Usage(prompt_tokens=len(prepared.ids), completion_tokens=0, was_cold=was_cold),
        )

    async def prefetch(self, adapter: AdapterRef) -> None:
        await self._outline(adapter)

    async def pin(self, adapter: AdapterRef) -> None:
        with self._admission():
            await self._residency.pin(adapter)

    async def unpin(self, version: str) -> None:
        self._residency.unpin(version)

    def stats(self) -> EngineStats:
        cache = self._engine.vllm_config.cache_config if self._engine is not None else None
        waiting = self._residency.num_waiting
        return EngineStats(
            running=self._admitted.num_inside - waiting,
            waiting=waiting,
            resident=self._residency.table.resident,
            held_slots=self._residency.table.num_held,
            kv_used_tokens=self._tokens_inside.total(),
            kv_capacity_tokens=0 if cache is None else (cache.num_gpu_blocks or 0) * cache.block_size,
            counters={**self._counters, **self._residency.counters},
        )

    async def check_health(self) -> None:
        if self._starting is not None and self._starting.done() and self._starting.exception() is not None:
            raise EngineFault("The engine could not start; see its log.")
        if self._engine is not None:
            try:
                await self._engine.check_health()
            except names.EngineDeadError as error:
                raise EngineFault("vLLM's engine process has died; this replica must be replaced.") from error

    async def _outputs(
        self,
        prepared: Prepared,
        visual: tuple[tuple[str, float], ...],
        shares: Mapping[str, float],
        binding: Binding,
        parameters: Any,
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for one prompt on one target. Closing it ends the request there before it returns."""
        number = str(next(self._next_number))
        prompt = engine_input(prepared, self._images, visual)
        self._tokens_inside[number] = len(prepared.ids)
        self._counters["prompt_tokens"] += len(prepared.ids)
        try:
            with self._bound_to(shares, binding) as lora:
                stream = self._engine.generate(prompt, parameters, number, lora_request=lora)
                async with aclosing(stream) as outputs:
                    async for output in outputs:
                        new = sum(len(choice.token_ids) for choice in output.outputs)
                        self._tokens_inside[number] += new
                        self._counters["generated_tokens"] += new
                        yield output
        except names.EngineDeadError as error:
            raise EngineFault("vLLM's engine process died while the request ran. Send it again.") from error
        finally:
            del self._tokens_inside[number]

    @contextmanager
    def _bound_to(self, shares: Mapping[str, float], binding: Binding) -> Iterator[Any]:
        """The LoRA request that stands for a target at vLLM, the same for all who use it at once.

        Its name holds the content and the slots: vLLM's caches key on the name, and its sets of requests
        take two of one name for one.
        """
        if not shares:
            yield None
            return
        path = binding.to_path()
        name = f"{hashlib.sha256(repr(sorted(shares.items())).encode()).hexdigest()} {path}"
        number, users = self._bound.get(name, (0, 0))
        number = number or next(self._next_id)
        self._bound[name] = number, users + 1
        try:
            yield names.LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        finally:
            _, users = self._bound.pop(name)
            if users > 1:
                self._bound[name] = number, users - 1

    async def _fill(self, slot: int, ref: AdapterRef) -> None:
        start = time.monotonic()
        pause = 0.005
        try:
            while True:
                said = await self._engine.collective_rpc("loom_fill", args=(slot, ref.path, ref.version))
                progress = {where for where, _ in said}
                if progress == {"done"}:
                    break
                if "reading" in progress:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, MAX_PAUSE_S)
            wrong = [error for _, error in said if error is not None]
            if wrong:
                # Another worker may have filled its part.
                await self._clear(slot)
        except names.EngineDeadError as error:
            raise EngineFault("vLLM's engine process died while an adapter was loaded. Send it again.") from error
        self._counters["adapter_loads"] += 1
        self._counters["adapter_load_seconds"] += time.monotonic() - start  # type: ignore[assignment]  # floats too
        if wrong:
            raise unpacked(*wrong[0])

    async def _clear(self, slot: int) -> None:
        await self._engine.collective_rpc("loom_clear", args=(slot,))

    @contextmanager
    def _admission(self) -> Iterator[None]:
        if self._is_closed or self._engine is None:
            raise EngineFault("The engine is not running.")
        with self._admitted.entered():
            yield

    async def _prepare(self, request: GenerateRequest | ClassifyRequest) -> tuple[Prepared, dict[str, AdapterOutline]]:
        """Tokenize, and read what is not known of the adapters, off the event loop and before any slot is taken."""
        refs = [ref for ref in request.adapters if ref.weight != 0]
        self._residency.table.check_fits(ref.version for ref in refs)
        for ref in refs:
            await self._outline(ref)
        loop = asyncio.get_running_loop()
        limit = self.info.max_model_len
        prepared = await loop.run_in_executor(self._executor, self._prompts.prepare, request.prompt, limit)
        return prepared.scoped(request.cache_scope), {ref.version: self._known[ref.version] for ref in refs}

    async def _outline(self, ref: AdapterRef) -> None:
        """Know what the adapter changes."""
        if ref.version not in self._known:
            loop = asyncio.get_running_loop()
            self._known[ref.version] = await loop.run_in_executor(self._executor, self._reader.outline, ref.path)


def _no_positions(ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM computes positions itself."""
    return torch.zeros(3, *ids.shape, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)


def _held(adapters: tuple[AdapterRef, ...], shares: Mapping[str, float]) -> dict[str, AdapterRef]:
    return {ref.version: ref for ref in adapters if ref.version in shares}


def _signature(slots: Mapping[str, int], shares: Mapping[str, float]) -> Signature:
    return tuple(sorted((slots[version], weight) for version, weight in shares.items()))


def _visual(known: Mapping[str, AdapterOutline], shares: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """The part of a target that an image's encoding depends on."""
    return tuple(sorted((v, w) for v, w in shares.items() if known[v].touches_vision))


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s


@asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """Raise DeadlineExceeded for what is awaited inside at ``deadline``, on the event loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("The request ran out of time.", retry_after_s=1) from error
