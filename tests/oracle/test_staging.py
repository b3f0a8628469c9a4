"""What processes that are killed leave of merges is removed, and what somebody may go on with is not."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from peft import LoraConfig

from lora_runtime.merge.scratch import scratch_folder, sweep_scratch
from serve.config import Settings
from serve.jobs.runner import Runner
from serve.jobs.sweeping import SETTLE_S, sweep
from serve.jobs.workload import Work, work_of
from serve.registry.database import Database
from serve.registry.merges import MergeJob, Merges, MergeState
from tests.oracle.jobs import TasksHere, planned, settings_of
from tests.oracle.models import save_adapter, tiny_qwen2vl

TASK = """
import sys, time
from contextlib import suppress
from pathlib import Path
from lora_runtime.errors import StoreUnavailable
from lora_runtime.merge.scratch import scratch_folder
from lora_runtime.merge.workspace import FolderWorkspace

root, name, identifier, scratch = sys.argv[1:]
staged = FolderWorkspace(Path(root), name, identifier)
with scratch_folder(Path(scratch)) as folder, staged.writing("part-00000.safetensors") as path:
    (folder / "half").write_text("x")
    path.write_bytes(b"x" * 1000)
    path.with_name(f".{path.name}.tmp").write_bytes(b"x" * 1000)
    print("at work", flush=True)
    while True:
        with suppress(StoreUnavailable):  # its folder was discarded under it, once
            staged.keep("part-00000", {})
        time.sleep(0.01)
"""


@contextmanager
def at_work(work: Work) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a task, which writes on until it is killed."""
    arguments = [work.site.root, work.site.name, work.site.id, work.site.scratch]
    with subprocess.Popen([sys.executable, "-c", TASK, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("staging")
    tiny_qwen2vl().save_pretrained(root / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    return root / "base", save_adapter(tiny_qwen2vl, config, root / "adapter", seed=1)


@pytest.fixture
def settings(tmp_path: Path, folders: tuple[Path, Path]) -> Settings:
    return settings_of(tmp_path / "state", folders[0])


@pytest.fixture
def merges(settings: Settings) -> Iterator[Merges]:
    database = Database(settings.registry_url)
    yield Merges(database)
    database.close()


def begun(merges: Merges, settings: Settings, adapter: Path, out: Path) -> tuple[MergeJob, Work]:
    recipe = {"method": "linear", "inputs": [{"adapter": str(adapter)}], "verify": {"probes": False}}
    plan = planned(settings, recipe, out)
    job = merges.create(plan.recipe.name, plan.model_dump(mode="json"), plan.id, actor="test", target=str(out))
    return job, work_of(plan, settings, target=str(out))


def ended(merges: Merges, settings: Settings) -> MergeJob:
    """The job that waits, carried out until it ends."""
    job = merges.claim("here", 600.0)
    assert job is not None
    Runner(settings, TasksHere())._run(job)  # type: ignore[arg-type]
    return merges.get(job.id)


def test_what_a_cancelled_jobs_task_wrote_is_swept(
    merges: Merges, settings: Settings, folders: tuple[Path, Path], tmp_path: Path
):
    """The task lives on for a while after the job was told to be over, and writes into what was discarded."""
    job, work = begun(merges, settings, folders[1], tmp_path / "out")
    staged = work.workspace()
    with at_work(work) as task:
        merges.cancel(job.id, actor="test")
        assert ended(merges, settings).state is MergeState.CANCELLED
        deadline = time.monotonic() + 30
        while staged.written_at() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sweep(merges, settings, now=time.time()) == [], "a task may still be at work"
        task.send_signal(signal.SIGKILL)
        task.wait()
    assert staged.written_at() is not None and list(tmp_path.glob(".staging/*"))
    assert sweep(merges, settings, now=time.time() + SETTLE_S + 1, since=time.time() + 60) == []
    assert sweep(merges, settings, now=time.time() + SETTLE_S + 1) == [job.id]
    assert staged.written_at() is None and not (tmp_path / ".staging").exists()
    assert sweep(merges, settings, now=time.time() + SETTLE_S + 1) == []


def test_a_runner_sweeps_when_it_starts(
    merges: Merges, settings: Settings, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job, work = begun(merges, settings, folders[1], tmp_path / "out")
    merges.cancel(job.id, actor="test")
    ended(merges, settings)
    work.workspace().keep("late", {})
    monkeypatch.setattr("serve.jobs.sweeping.SETTLE_S", 0.0)
    runner = Runner(settings, TasksHere())  # type: ignore[arg-type]
    runner.start()
    deadline = time.monotonic() + 30
    while work.workspace().written_at() is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.stop()
    assert work.workspace().written_at() is None


def test_what_a_job_goes_on_with_stays_and_what_was_half_written_is_not_published(
    merges: Merges, settings: Settings, folders: tuple[Path, Path], tmp_path: Path
):
    _, work = begun(merges, settings, folders[1], tmp_path / "out")
    with at_work(work):
        pass
    work.workspace().keep("kept", {"plan": "x"})
    assert sweep(merges, settings, now=time.time() + 10 * SETTLE_S) == []
    assert work.workspace().record("kept") == {"plan": "x"}
    assert list((tmp_path / ".staging").rglob("*.part.tmp"))
    assert ended(merges, settings).state is MergeState.SUCCEEDED
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}
    assert not (tmp_path / ".staging").exists()
    again, _ = begun(merges, settings, folders[1], tmp_path / "other")
    assert again.ended_at is None and sweep(merges, settings, now=time.time() + 10 * SETTLE_S) == []


def test_an_earlier_job_of_the_same_plan_does_not_take_it_away(
    merges: Merges, settings: Settings, folders: tuple[Path, Path], tmp_path: Path
):
    first, work = begun(merges, settings, folders[1], tmp_path / "out")
    merges.cancel(first.id, actor="test")
    ended(merges, settings)
    second, again = begun(merges, settings, folders[1], tmp_path / "out")
    assert again.site == work.site and second.id != first.id
    work.workspace().keep("unit", {})
    assert sweep(merges, settings, now=time.time() + 10 * SETTLE_S) == []
    assert again.workspace().record("unit") == {}


def test_scratch_of_a_killed_process_is_removed_by_the_next(
    merges: Merges, settings: Settings, folders: tuple[Path, Path], tmp_path: Path
):
    _, work = begun(merges, settings, folders[1], tmp_path / "out")
    scratch = Path(work.site.scratch)
    with at_work(work) as task:
        assert sweep_scratch(scratch) == 0 and len(list(scratch.iterdir())) == 1, "its owner is at work"
        with scratch_folder(scratch) as own:
            assert len(list(scratch.iterdir())) == 2 and list(own.iterdir()) == []
        task.send_signal(signal.SIGKILL)
        task.wait()
        assert len(list(scratch.iterdir())) == 1
        with scratch_folder(scratch) as own:
            (own / "x").write_text("x")
            assert [folder.name for folder in scratch.iterdir()] == [own.parent.name]
    assert list(scratch.iterdir()) == []
