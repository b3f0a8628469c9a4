"""How much memory each process of a service takes, and whether it grows."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import psutil

from tests.served import Served

ROLES = {
    "gateway": "ray::ServeReplica:loom:Gateway",
    "engine": "ray::ServeReplica:loom:Engine",
    "intake": "ray::ServeReplica:loom:Intake",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
    "jobs actor": "ray::JobsActor",
    "gcs": "gcs/gcs_server",
    "raylet": "raylet/raylet",
    "dashboard agent": "ray::DashboardAgent",
    "env agent": "ray::RuntimeEnvAgent",
    "loom serve": "-m serve.cli serve",
}
"""What each process's command line has."""
LASTING = frozenset(ROLES) - {"jobs actor"}
"""Those of which one process lasts from the start to the end."""
SAMPLE_S = 5.0
MIB = 1 << 20
BOUND_MIB_PER_MIN = {"engine": 4.0, "gateway": 2.0}
OTHER_BOUND_MIB_PER_MIN = 1.0
MIN_JUDGED_S = 300.0
"""Of the load: half of less is too short to tell growth from caches that fill."""


@dataclass(slots=True)
class Memory:
    """Resident memory of each process of ``served``, in MiB by role, sampled until it is cancelled."""

    served: Served
    begun: float = field(default_factory=time.monotonic)
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    pids: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    async def watch(self) -> None:
        """Sample every SAMPLE_S, and print every minute."""
        minute = 0
        while True:
            await asyncio.to_thread(self.sample)
            if (elapsed := time.monotonic() - self.begun) >= 60 * minute:
                shown = ", ".join(f"{role} {found[-1][1]:.0f}" for role, found in sorted(self.samples.items()))
                print(f"{elapsed / 60:5.1f} min, MiB resident: {shown}", flush=True)
                minute += 1
            await asyncio.sleep(SAMPLE_S)

    def sample(self) -> None:
        now = time.monotonic() - self.begun
        resident: dict[str, float] = defaultdict(float)
        for process in self.served.family():
            try:
                command, size = " ".join(process.cmdline()), process.memory_info().rss / MIB
            except psutil.NoSuchProcess:
                continue
            role = next((role for role, text in ROLES.items() if text in command), None)
            if role is not None:
                resident[role] += size
                self.pids[role].add(process.pid)
        for role, size in resident.items():
            self.samples[role].append((now, size))

    def slope(self, role: str) -> float:
        """Of the second half, by least squares, in MiB a minute."""
        found = self.samples[role]
        half = [(at / 60, size) for at, size in found if at >= found[-1][0] / 2]
        if len(half) < 2:
            return 0.0
        times, sizes = np.array(half).T
        return float(np.polyfit(times, sizes, 1)[0])

    def bound(self, role: str) -> float:
        return BOUND_MIB_PER_MIN.get(role, OTHER_BOUND_MIB_PER_MIN)

    def problems(self) -> list[str]:
        """Processes that grow faster than their bound, and processes that took another's place."""
        found = [
            f"{role}: {len(pids)} processes where one should have lasted"
            for role, pids in self.pids.items()
            if role in LASTING and len(pids) > 1
        ]
        if self.samples and max(samples[-1][0] for samples in self.samples.values()) >= MIN_JUDGED_S:
            grown = {role: self.slope(role) for role in self.samples}
            found += [f"{r}: grows by {s:.1f} MiB a minute" for r, s in grown.items() if s > self.bound(r)]
        return found

    def table(self) -> str:
        lines = [f"{'process':<18}{'first':>8}{'half':>8}{'last':>8}{'most':>8}{'MiB/min, 2nd half':>19}{'bound':>8}"]
        for role, found in sorted(self.samples.items()):
            sizes = [size for _, size in found]
            shown = (sizes[0], sizes[len(sizes) // 2], sizes[-1], max(sizes))
            row = "".join(f"{size:>8.0f}" for size in shown)
            lines.append(f"{role:<18}{row}{self.slope(role):>19.2f}{self.bound(role):>8.1f}")
        return "\n".join(lines)
