"""Merge jobs on a real Ray cluster of several nodes, some of which die: the result is the same, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from lora_runtime.zoo.paths import ADAPTERS
from serve.config import Settings
from serve.jobs.cluster import ensure_runner, runner_name, stop_runner
from serve.loading import load_settings
from serve.registry.database import Database
from serve.registry.merges import Merges, MergeState
from tests.cluster.clusters import NODE, cluster_of
from tests.cluster.merging import build_adapter, build_base, followed, hashes, submit

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

GB = 1_000_000_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, list[str]]:
    """A base of more than 1 GB, two adapters, and the settings of a service on it."""
    folder = tmp_path_factory.mktemp("merging")
    assert build_base(folder / "base", 8, "60MB") > GB
    adapters = [
        str(build_adapter(folder / name, folder / "base", seed=seed, norms=seed == 2))
        for seed, name in ((1, "one"), (2, "two"))
    ]
    settings = load_settings(
        {
            "state_dir": str(folder / "state"),
            "base": {"name": "two-billion", "path": str(folder / "base")},
            "engine": {"kind": "embedded"},
        }
    )
    return settings, folder, adapters


@pytest.fixture(scope="module")
def cluster(world: tuple[Settings, Path, list[str]]) -> Iterator[Cluster]:
    with cluster_of(3, head_cpus=0) as started:
        yield started
        stop_runner(world[0])


def recipe(name: str, adapters: list[str], **more: object) -> dict[str, object]:
    inputs = [{"adapter": adapter, "weight": weight} for adapter, weight in zip(adapters, (0.7, -0.4), strict=True)]
    verify = {"probes": False}
    return {
        "name": name, "product": "checkpoint", "method": "linear", "inputs": inputs, "verify": verify, **more,
    }  # fmt: skip


def test_a_node_that_dies_costs_its_unfinished_shards_only(cluster: Cluster, world: tuple[Settings, Path, list[str]]):
    settings, _, adapters = world
    ensure_runner(settings)
    undisturbed = followed(settings, submit(settings, recipe("undisturbed", adapters)))
    assert undisturbed.state is MergeState.SUCCEEDED, undisturbed.error
    want = hashes(settings, "undisturbed")
    assert len(want) >= 8
    for file, digest in want.items():
        with open(Path(settings.merges_url) / "undisturbed" / file, "rb") as opened:
            assert hashlib.file_digest(opened, "sha256").hexdigest() == digest

    killed: list[str] = []

    def kill_one(states: dict[str, str]) -> None:
        shards = [state for unit, state in states.items() if unit.endswith(".safetensors") and "check" not in unit]
        if not killed and 2 <= shards.count("done") < len(shards) - 2:
            victim = next(iter(cluster.worker_nodes))
            killed.append(victim.node_id)
            cluster.remove_node(victim, allow_graceful=False)

    disturbed = followed(settings, submit(settings, recipe("disturbed", adapters)), kill_one)
    assert killed, "the job was over before a node was killed"
    assert disturbed.state is MergeState.SUCCEEDED, disturbed.error
    assert hashes(settings, "disturbed") == want
    cluster.add_node(**NODE)

    merges = Merges(Database(settings.registry_url))
    for job in (undisturbed, disturbed):
        peaks = {unit.unit: unit.peak_bytes for unit in merges.units(job.id) if unit.kind in ("merge", "check")}
        print(f"\n{job.name}: {len(want)} shards, most memory of a task {max(peaks.values()) / 1e6:.0f} MB")
        assert all(peak and peak < GB for peak in peaks.values()), peaks


def test_the_owner_may_be_killed_and_done_shards_stay_done(cluster: Cluster, world: tuple[Settings, Path, list[str]]):
    settings, _, adapters = world
    ensure_runner(settings)
    seen: dict[str, tuple[str, float | None]] = {}
    merges = Merges(Database(settings.registry_url))
    job = submit(settings, recipe("owned", adapters))

    def kill_owner(states: dict[str, str]) -> None:
        done = [unit for unit, state in states.items() if unit.endswith(".safetensors") and state == "done"]
        if not seen and 2 <= len(done) < len(states) // 2 - 2:
            seen.update({u.unit: (u.node, u.seconds) for u in merges.units(job.id) if u.unit in done})
            for process in psutil.process_iter(["cmdline"]):
                if " ".join(process.info["cmdline"] or []).startswith("ray::JobsActor"):
                    os.kill(process.pid, signal.SIGKILL)

    ended = followed(settings, job, kill_owner)
    assert seen, "the job was over before its owner was killed"
    assert ended.state is MergeState.SUCCEEDED and ended.fence > 1, ended.error
    after = {unit.unit: (unit.node, unit.seconds) for unit in merges.units(job.id)}
    assert {unit: after[unit] for unit in seen} == seen, "what was done was not done again"
    assert hashes(settings, "owned") == hashes(settings, "undisturbed")
    lines = [line.message for line in merges.log(job.id)]
    assert any("done before" in line for line in lines), lines
    assert ray.get_actor(runner_name(settings), namespace="loom") is not None


def test_the_command_merges_on_a_cluster_that_is_there(
    cluster: Cluster, world: tuple[Settings, Path, list[str]], tmp_path: Path
):
    ensure_runner(world[0])
    (tmp_path / "recipe.json").write_text(
        json.dumps({"method": "cat", "inputs": [{"adapter": str(ADAPTERS["shape"])}], "verify": {"probes": False}})
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "serve.cli", "merge", "recipe.json", "--out", str(tmp_path / "made"),
            "--address", cluster.address,
        ],
        cwd=tmp_path, env={**os.environ, "LOOM_STATE_DIR": str(tmp_path / "state")},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "made" / "adapter_model.safetensors").is_file(), done.stdout
    assert ray.get_actor(runner_name(world[0]), namespace="loom") is not None, "what others have there stays"
    actors = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert len([name for name in actors if name.startswith("loom-jobs")]) == 1, actors


def test_the_result_does_not_depend_on_how_many_nodes_there_are(
    cluster: Cluster, world: tuple[Settings, Path, list[str]]
):
    """Nor on the order of the inputs, for a method that draws at random."""
    settings, _, adapters = world
    ensure_runner(settings)
    more = {"method": "dare_linear", "density": 0.9, "seed": 7}
    first = followed(settings, submit(settings, recipe("drawn", adapters, **more)))
    for node in list(cluster.worker_nodes)[:2]:
        cluster.remove_node(node)
    turned = recipe("drawn-again", adapters, **more)
    turned["inputs"] = list(reversed(turned["inputs"]))  # type: ignore[call-overload]
    second = followed(settings, submit(settings, turned))
    assert first.state is second.state is MergeState.SUCCEEDED, (first.error, second.error)
    assert hashes(settings, "drawn") == hashes(settings, "drawn-again") != hashes(settings, "undisturbed")
