"""Ray's coat for merge jobs: tasks of one function, and the actor that owns them.

Tasks die with their owner, so it is a detached actor that Ray restarts, and never a replica, which scaling takes away.
What it works on is in the registry: a new one goes on where the old one was.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from lora_runtime.errors import LoomError, StoreUnavailable
from serve.config import Settings
from serve.handover import Handover, handed_over, taken_over

NAMESPACE = "loom"
TICK_S = 1.0
STOP_S = 20.0

log = logging.getLogger(__name__)


class TaskLost(LoomError):
    """A task's process or node was lost, again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One task: a function of ``work.py`` by its name, what it is asked for beside the work, and what it may need."""

    step: str
    unit: str | None = None
    memory_bytes: int = 0

    @property
    def name(self) -> str:
        return self.step if self.unit is None else f"{self.step}:{self.unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Of one call: it yielded ``value``, or is done. ``call`` is None where only time went by."""

    call: Call | None = None
    value: Any = None
    is_done: bool = False


def _perform(work: Any, step: str, unit: str | None) -> Iterator[Any]:
    from serve.jobs import work as steps  # here, in the task's process: the owner needs no torch

    do = getattr(steps, step)
    result = do(work) if unit is None else do(work, unit)
    if isinstance(result, dict):
        yield result
    else:
        yield from result


class RayTasks:
    """Runs calls as Ray tasks, spread over the cluster."""

    def __init__(self, settings: Settings) -> None:
        self._options = {
            "num_cpus": settings.merges.num_cpus,
            "resources": dict(settings.merges.resources),
            "max_retries": settings.merges.max_retries,
            "retry_exceptions": [StoreUnavailable],
            "scheduling_strategy": "SPREAD",
            "num_returns": "streaming",
        }

    def largest_memory(self) -> float:
        """Of the cluster's nodes, in bytes, as far as Ray may give it out."""
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return max((node["Resources"].get("memory", 0.0) for node in nodes if node["Alive"]), default=0.0)

    @contextmanager
    def started(self, work: Any, calls: Sequence[Call]) -> Iterator[Iterator[Progress]]:
        """The calls' progress, at least every second, until all are done; whatever ends it, no task goes on.

        The iterator raises what a call raised, and TaskLost.
        """
        task: Any = ray.remote(_perform)
        going = {
            task.options(**self._options, memory=call.memory_bytes or None, name=f"loom:{call.name}").remote(
                work, call.step, call.unit
            ): call
            for call in calls
        }
        try:
            yield self._progress(going)
        finally:
            for stream in going:
                with suppress(RayError):
                    ray.cancel(stream, force=True)

    def _progress(self, going: dict[Any, Call]) -> Iterator[Progress]:
        while going:
            ready, _ = ray.wait(list(going), num_returns=len(going), timeout=TICK_S)
            yield Progress()
            for stream in ready:
                call = going[stream]
                following: Any = stream
                try:
                    value = ray.get(next(following))
                except StopIteration:
                    del going[stream]
                    yield Progress(call=call, is_done=True)
                except (RayError, LoomError) as error:
                    del going[stream]
                    raise _translated(call, error) from error
                else:
                    yield Progress(call=call, value=value)


def _translated(call: Call, error: BaseException) -> LoomError:
    if isinstance(error, LoomError):
        return error
    if isinstance(error, RayTaskError):
        cause: BaseException = error.cause
        if isinstance(cause, LoomError):
            return cause
        log.error("%s failed", call.name, exc_info=error)
        return TaskLost(f"'{call.name}' failed: {type(cause).__name__}: {str(cause)[:500]}", task=call.name)
    if isinstance(error, TaskCancelledError):
        return TaskLost(f"'{call.name}' was cancelled from outside.", task=call.name)
    return TaskLost(f"'{call.name}' was lost with its process or node, more often than is retried.", task=call.name)


class JobsActor:
    """The owner of all merge tasks of a registry's jobs."""

    def __init__(self, settings: Handover, digest: str) -> None:
        from serve.jobs.runner import Runner

        self._digest = digest
        checked = taken_over(settings)
        self._runner = Runner(checked, RayTasks(checked))
        self._runner.start()

    def digest(self) -> str:
        """Of the settings it was made with."""
        return self._digest

    def stop(self) -> None:
        """End all work and let go of it: whoever comes next goes on at once."""
        self._runner.stop()


def runner_name(settings: Settings) -> str:
    """The actor's. Others on the same cluster, with registries of their own, have actors of their own."""
    return f"loom-jobs-{hashlib.sha256(settings.registry_name.encode()).hexdigest()[:12]}"


def ensure_runner(settings: Settings) -> None:
    """Have the registry's jobs actor up, with these settings; one with others is replaced, and what it did goes on.

    Only in a process that is connected to Ray. Raises RayError.
    """
    digest = hashlib.sha256(handed_over(settings).values.encode()).hexdigest()
    actor = _made(settings, digest)
    if ray.get(actor.digest.remote()) != digest:
        stop_runner(settings)
        ray.get(_made(settings, digest).digest.remote())


def stop_runner(settings: Settings) -> None:
    """End the jobs actor, if there is one; jobs that have not ended wait for the next."""
    try:
        actor = ray.get_actor(runner_name(settings), namespace=NAMESPACE)
    except ValueError:
        return
    with suppress(RayError):
        ray.get(actor.stop.remote(), timeout=STOP_S)
    ray.kill(actor, no_restart=True)


def _made(settings: Settings, digest: str) -> Any:
    actor: Any = ray.remote(JobsActor)
    return actor.options(
        name=runner_name(settings),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=4,
    ).remote(handed_over(settings), digest)
