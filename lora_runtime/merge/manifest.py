"""What a merge's result says of itself: what went in, what was done, what was measured. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_runtime.merge.job import Plan

FORMAT = 1
PACKAGES = ("loom-serve", "torch", "transformers", "peft", "safetensors", "numpy")


def manifest_of(plan: Plan, report: Mapping[str, Any], *, job: str, actor: str, created_at: str) -> dict[str, Any]:
    """JSON-able. ``report``: as :func:`report_of` made it."""
    recipe = plan.recipe
    content: dict[str, Any] = {
        "format": FORMAT,
        "product": recipe.product,
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "semantics": recipe.semantics,
        "seed": recipe.seed,
        "base": {"name": plan.base.name, "revision": plan.base.revision},
        "inputs": [
            {"adapter": found.adapter, "version": found.version, "method": found.method, "base": found.base_name}
            for found in plan.inputs
        ],
        "version": plan.version,
        "plan": plan.id,
        **report,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {
        **content,
        "sha256": digest,
        "packages": {name: _version(name) for name in PACKAGES},
        "job": job,
        "actor": actor,
        "created_at": created_at,
    }


def report_of(
    plan: Plan,
    records: Mapping[str, Mapping[str, Any]],
    assembly: Mapping[str, Any],
    *,
    probe: Mapping[str, Any] | None,
    warnings: list[str],
    search: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What was measured. ``records``: of the plan's units, by name; ``assembly``: what was reported of
    the files beside them."""
    files, tensors, leaves = dict(assembly["files"]), {}, {}
    for unit in plan.units:
        told = records[unit.name]["report"]
        leaves.update(told.get("leaves", {}))
        if plan.recipe.product == "checkpoint":
            files[unit.file] = {"sha256": told["sha256"], "bytes": told["num_bytes"]}
            tensors.update(told["tensors"])
    energies = [told["energy"] for told in leaves.values()]
    return {
        "files": files,
        "tensors": tensors,
        "leaves": leaves,
        "kept_energy": {"least": min(energies), "mean": sum(energies) / len(energies)} if energies else None,
        "verification": {
            "bytes": plan.recipe.product == "checkpoint",
            "probe": probe,
            "method": {
                "checked": sum(told.get("is_checked", False) for told in leaves.values()),
                "passed_over": sum(not told.get("is_checked", False) for told in leaves.values()),
            },
        },
        "warnings": warnings,
        "search": search,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
