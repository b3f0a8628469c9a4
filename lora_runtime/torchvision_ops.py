"""Lets a torchvision built for CUDA be imported beside a CPU build of torch.

PyPI has torchvision for CUDA only. Beside CPU torch its compiled operators do not load, and
``import torchvision`` dies with "operator torchvision::nms does not exist", although nothing here
uses that operator: transformers' video processor and vLLM only want the package to be there.

``loom_torchvision.pth`` runs :func:`install` when Python starts, in every process of the environment, since
vLLM inspects models in processes of its own. It costs a microsecond until something imports torchvision; then
the two operators that torchvision's import needs are declared, if and only if torchvision's own do not load.
They have no implementation: calling them fails.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _TorchvisionFinder(MetaPathFinder):
    """Finds nothing itself; it acts when torchvision is looked for, once, and leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            _declare_missing(Path(spec.origin).parent)
        return None


def install() -> None:
    """Arm the hook in this process. Idempotent; imports nothing."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _TorchvisionFinder) for f in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())


def _declare_missing(package: Path) -> None:
    try:
        import torch
    except ImportError:
        return
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", SCHEMA)
