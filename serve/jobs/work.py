"""What tasks of a merge do. Plain functions of frozen values: Ray's coat is in ``cluster.py``.

Each can be done again: it leaves the same bytes, and its record, which is written last, says that it was done. What a
task yields while it works is how many bytes it has written.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import ray
import torch

from lora_runtime.engine.factory import create_examiner
from lora_runtime.errors import MergeRefused, VerificationFailed
from lora_runtime.export import write_adapter
from lora_runtime.folder import FILES
from lora_runtime.merge.base import BaseShard
from lora_runtime.merge.check import check_shard
from lora_runtime.merge.expected import expected_of
from lora_runtime.merge.job import Unit
from lora_runtime.merge.parts import read_parts, write_part
from lora_runtime.merge.planning import Located, Opened, opened
from lora_runtime.merge.scratch import scratch_folder
from lora_runtime.merge.shard import ShardReport, TensorReport, merge_shard
from lora_runtime.merge.verify import check_adapter, rounding_warnings, verify_adapter, verify_checkpoint
from lora_runtime.merge.workspace import Workspace
from lora_runtime.parameters import BaseParameters
from serve.handover import Handover, taken_over
from serve.jobs.searching import searched
from serve.jobs.workload import ASSEMBLY, PROBE, Work, check_of
from serve.storage import copies_of, store_of

PROGRESS_S = 1.0
SAID = "loom.merge"
"""Of a merged adapter's metadata: what it was made of."""


def merge_unit(work: Work, name: str) -> Iterator[int]:
    """Make one unit: an output shard, or a part of an adapter."""
    unit = work.unit(name)
    yield from _recorded(work, name, unit.file, lambda path: _merged(work, unit, path))


def search_weights(work: Work) -> Iterator[dict[str, Any]]:
    """Look for weights on live engines: each new trial, and the result at last."""
    trials: Queue[dict[str, Any]] = Queue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, searched(work, trials.put))
        while not running.done() or not trials.empty():
            try:
                yield trials.get(timeout=PROGRESS_S)
            except Empty:
                continue
        yield running.result()


def check_unit(work: Work, name: str) -> Iterator[int]:
    """Read an output shard back and hold it against its source. Raises VerificationFailed."""
    yield from _recorded(work, check_of(name), None, lambda _: _checked(work, work.unit(name)))


def assemble(work: Work) -> Iterator[int]:
    """Make the PEFT adapter of its parts, or put what belongs to a checkpoint beside its shards."""
    do = _assembled if work.plan.recipe.product == "adapter" else _beside
    yield from _recorded(work, ASSEMBLY, None, lambda _: do(work))


def probe(work: Work) -> Iterator[int]:
    """Load the result as its users will, and ask it. Raises VerificationFailed."""
    yield from _recorded(work, PROBE, None, lambda _: _probed(work))


def admit(work: Work) -> dict[str, Any]:
    """Put a merged adapter into the store: its version, its location, and what examination found."""
    settings = work.settings
    store = store_of(settings)
    examiner = create_examiner(settings.engine.kind, settings.engine_options)
    with work.workspace().result() as result, store.staging() as folder:
        for name in FILES:
            if (result / name).is_file():
                shutil.copy(result / name, folder / name)
        info = asdict(asyncio.run(examiner.examine(str(folder))))
        version = info.pop("version")
        return {"version": version, "location": store.publish(folder, version), "info": info}


def _recorded(work: Work, name: str, file: str | None, do: Callable[[Path], dict[str, Any]]) -> Iterator[int]:
    """Do it unless it is recorded as done; ``do`` is given where to write ``file``."""
    workspace = work.workspace()
    if work.is_done(workspace.record(name)):
        return
    begun = time.monotonic()
    _forget_peak()
    if file is None:
        report = yield from _telling(lambda: do(Path()), lambda: 0)
    else:
        with workspace.writing(file) as path:
            report = yield from _telling(lambda: do(path), lambda: _written(path))
    workspace.keep(
        name,
        {
            "plan": work.plan.id,
            "base": work.stamp,
            "seconds": round(time.monotonic() - begun, 3),
            "peak_bytes": _peak_bytes(),
            "node": _node(),
            "pid": os.getpid(),
            "report": report,
        },
    )


def _telling(
    do: Callable[[], dict[str, Any]], num_bytes: Callable[[], int]
) -> Generator[int, None, dict[str, Any]]:
    """What ``do`` returns, and ``num_bytes`` now and then until it does."""
    with ThreadPoolExecutor(1) as pool:
        running: Future[dict[str, Any]] = pool.submit(do)
        while not wait([running], timeout=PROGRESS_S).done:
            yield num_bytes()
        return running.result()


def _merged(work: Work, unit: Unit, path: Path) -> dict[str, Any]:
    found = _open(work)
    inputs = found.inputs(work.plan.recipe)
    if work.plan.recipe.product == "checkpoint":
        shard = _shard(found, unit)
        report = merge_shard(found.base.folder / shard.file, path, inputs, shard.places)
        leaves = {leaf: asdict(told) for leaf, told in inputs.leaves.items()}
        return {**asdict(report), "leaves": leaves, "warnings": rounding_warnings(report.tensors)}
    merged = inputs.merged(unit.leaves, with_heads=unit == work.plan.units[0])
    write_part(merged, path)
    return {"leaves": {leaf: asdict(told) for leaf, told in merged.leaves.items()}}


def _checked(work: Work, unit: Unit) -> dict[str, Any]:
    found = _open(work)
    shard = _shard(found, unit)
    changed = found.inputs(work.plan.recipe).places
    told = _report(work, unit)
    with work.workspace().reading(unit.file) as target:
        unchanged = check_shard(found.base.folder / shard.file, target, shard.touched(changed).keys(), told)
    lost = [name for name in unchanged if told.tensors[name].delta_norm > 0]
    if lost and not work.plan.recipe.verify.allow_lost:
        raise VerificationFailed(
            f"{len(lost)} tensors of {unit.file} are as they were, since their dtype cannot hold the change: "
            f"{', '.join(lost[:4])}. Keep the adapters as adapters, merge into a base in fp32, or say "
            "verify.allow_lost.",
            tensors=lost,
        )
    return {"unchanged": list(unchanged)}


def _assembled(work: Work) -> dict[str, Any]:
    workspace, plan = work.workspace(), work.plan
    found = _open(work)
    with workspace.result() as parts:
        merged = read_parts([parts / unit.file for unit in plan.units])
        # Nothing of when and where: equal merges are equal files.
        said = {SAID: plan.recipe.arithmetic.provenance(plan.versions)}
        with scratch_folder(Path(work.site.scratch)) as scratch:
            folder = scratch / "adapter"
            write_adapter(
                merged.weights,
                folder,
                found.layout,
                base_name=plan.base.name,
                dtype=getattr(torch, plan.recipe.dtype),
                said=said,
            )
            _, warnings = check_adapter(folder, found.layout, merged.weights, BaseParameters(found.base.folder))
            files = {file.name: _put(workspace, file, file.name) for file in sorted(folder.iterdir())}
    return {"files": files, "warnings": warnings}


def _beside(work: Work) -> dict[str, Any]:
    workspace, base = work.workspace(), _open(work).base
    return {"files": {name: _put(workspace, base.folder / name, name) for name in base.beside}, "warnings": []}


def _put(workspace: Workspace, source: Path, name: str) -> dict[str, Any]:
    """Copy a file into the result; its hash and size."""
    with workspace.writing(name) as path:
        shutil.copyfile(source, path)
    with open(source, "rb") as opened_file:
        digest = hashlib.file_digest(opened_file, "sha256").hexdigest()
        return {"sha256": digest, "bytes": os.fstat(opened_file.fileno()).st_size}


def _probed(work: Work) -> dict[str, Any]:
    plan, found = work.plan, _open(work)
    base = BaseParameters(found.base.folder)
    merged = found.inputs(plan.recipe).merged().weights
    members = {name: adapter.weights() for name, adapter in found.adapters.items()}
    expected = expected_of(plan.recipe.arithmetic, members, base, merged)
    with work.workspace().result() as result:
        if plan.recipe.product == "adapter":
            report = verify_adapter(result, found.base.folder, expected)
        else:
            lost = plan.recipe.verify.allow_lost
            report = verify_checkpoint(result, found.base.folder, expected, allow_lost=lost)
    return asdict(report)


def _open(work: Work) -> Opened:
    inputs = tuple((found.adapter, found.version, found.location) for found in work.plan.inputs)
    return _opened(work.plan.base.path, inputs, work.handover, work.stamp)


@lru_cache(maxsize=1)
def _opened(base: str, inputs: tuple[tuple[str, str, str], ...], handover: Handover, _: str) -> Opened:
    checked = taken_over(handover)
    copies = copies_of(checked)
    located = [
        Located(adapter=adapter, version=version, location=location, folder=copies.folder_of(location, version))
        for adapter, version, location in inputs
    ]
    return opened(base, located, max_materialised_bytes=checked.merges.materialised_bytes)


def _shard(found: Opened, unit: Unit) -> BaseShard:
    return next(shard for shard in found.base.shards if shard.file == unit.file)


def _report(work: Work, unit: Unit) -> ShardReport:
    record = work.workspace().record(unit.name)
    if record is None:
        raise MergeRefused(f"What was done of {unit.file} is gone; start the merge again.", problems=[])
    told = record["report"]
    return ShardReport(
        sha256=told["sha256"],
        num_bytes=told["num_bytes"],
        tensors={name: TensorReport(**one) for name, one in told["tensors"].items()},
    )


def _written(path: Path) -> int:
    sizes = [file.stat().st_size for file in path.parent.glob(f"*{path.name}*") if file.is_file()]
    return max(sizes, default=0)


def _node() -> str:
    """The machine, and the Ray node on it that this is a process of, if it is one's."""
    node = ray.get_runtime_context().get_node_id()[:8] if ray.is_initialized() else "-"
    return f"{socket.gethostname()}/{node}"


def _forget_peak() -> None:
    """Linux only: elsewhere the peak is the process's whole life's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int | None:
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return None
    return int(status["VmHWM"].split()[0]) * 1024
