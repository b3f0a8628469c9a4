"""Working off merge jobs: claiming them from the registry, one thread for each, until they end."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from datetime import timedelta

from lora_runtime.errors import LoomError
from serve.config import Settings
from serve.jobs.cluster import RayTasks
from serve.jobs.run import LEASE_S, MergeRun, Stopped
from serve.jobs.sweeping import sweep
from serve.logs import configure
from serve.registry.database import Database
from serve.registry.errors import RegistryUnavailable
from serve.registry.garbage import Garbage
from serve.registry.merges import ENDED, LeaseLost, MergeJob, Merges, MergeState
from serve.registry.repository import Repository
from serve.storage import store_of
from serve.work_telemetry import MergeMetrics

POLL_S = 1.0
SWEEP_S = 600.0

log = logging.getLogger(__name__)


class Runner:
    """Works off what is in the registry, ``at_once`` jobs together. Others may do so beside it: leases part them."""

    def __init__(self, settings: Settings, tasks: RayTasks) -> None:
        configure(settings.telemetry.log_level)
        self._settings = settings
        self._tasks = tasks
        database = Database(settings.registry_url)
        self._merges = Merges(database)
        self._repository = Repository(database)
        self._store = store_of(settings)
        self._garbage = Garbage(database, self._store, timedelta(seconds=settings.store.grace_s))
        self._metrics = MergeMetrics()
        self._owner = uuid.uuid4().hex
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._loop = threading.Thread(target=self._work, name="merges", daemon=True)
        self._sweeps = threading.Thread(target=self._sweep, name="merge-sweep", daemon=True)

    def start(self) -> None:
        self._loop.start()
        self._sweeps.start()

    def stop(self) -> None:
        """End all work; jobs are left as they stand, for whoever comes next."""
        self._stopping.set()
        for thread in (self._loop, self._sweeps, *self._threads.values()):
            thread.join()

    def _work(self) -> None:
        while not self._stopping.wait(POLL_S):
            self._threads = {job: thread for job, thread in self._threads.items() if thread.is_alive()}
            self._metrics.running(len(self._threads))
            if len(self._threads) >= self._settings.merges.at_once:
                continue
            try:
                job = self._merges.claim(self._owner, LEASE_S, other_than=self._threads)
            except Exception as error:  # whatever it is, the next look may succeed
                log.warning("merge jobs cannot be read: %s", error)
                continue
            if job is not None:
                thread = threading.Thread(target=self._run, args=(job,), name=job.id, daemon=True)
                self._threads[job.id] = thread
                thread.start()

    def _sweep(self) -> None:
        """What killed tasks left: of all jobs at the start, and now and then of those that ended since."""
        since = 0.0
        while not self._stopping.is_set():
            try:
                sweep(self._merges, self._settings, now=time.time(), since=since)
                since = time.time() - 6 * SWEEP_S
            except Exception as error:  # whatever it is, the next look may succeed
                log.warning("staged files of ended merges cannot be looked at: %s", error)
            self._stopping.wait(SWEEP_S)

    def _run(self, job: MergeJob) -> None:
        run = MergeRun(
            job,
            self._settings,
            merges=self._merges,
            repository=self._repository,
            garbage=self._garbage,
            store=self._store,
            tasks=self._tasks,
            stopping=self._stopping,
        )
        try:
            self._carry_out(job, run)
            state = self._merges.get(job.id).state
            if state in ENDED:
                self._metrics.ended(state)
        except (LeaseLost, RegistryUnavailable) as error:
            # What was done is recorded, and whoever claims the job next goes on from there.
            log.warning("%s is left: %s", job.id, error)

    def _carry_out(self, job: MergeJob, run: MergeRun) -> None:
        try:
            run.carry_out()
        except Stopped:
            self._merges.release(job)
        except (LeaseLost, RegistryUnavailable):
            raise
        except LoomError as error:
            run.give_up(MergeState.FAILED, error.message)
        except Exception as error:  # a job that fails in any way is told so, and the next one is worked on
            log.error("%s failed", job.id, exc_info=error)
            run.give_up(MergeState.FAILED, f"The merge failed by a fault of Loom's: {type(error).__name__}.")
