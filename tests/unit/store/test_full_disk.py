"""A full or read-only medium: StoreUnavailable, nothing half there, and what is there goes on being served.

Limits of the kernel stand in for the disk: a process of its own may not write files beyond a few bytes.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_runtime.errors import StoreUnavailable
from lora_runtime.folder import fingerprint
from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.factory import open_store
from tests.fakes import write_fake_adapter

LIMITED = """
import io, resource, signal, sys
from pathlib import Path
from lora_runtime.errors import StoreUnavailable
from lora_runtime.store.factory import open_store
from lora_runtime.store.sources import copy_bounded

what, root = sys.argv[1], Path(sys.argv[2])
store = open_store(str(root / "store"), root / "scratch")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if what == "receive":
        store.receive("0" * 32, "adapter_model.safetensors", io.BytesIO(bytes(100_000)))
    else:
        with store.staging() as folder:
            copy_bounded(io.BytesIO(bytes(100_000)), folder / "adapter_model.safetensors", 1 << 20, 1 << 20)
except StoreUnavailable as error:
    print("refused:", error.message)
"""


@pytest.mark.parametrize("what", ["receive", "copy"])
def test_a_file_that_does_not_fit_is_refused_and_not_kept(tmp_path: Path, what: str):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, what, str(tmp_path)],
        capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert "refused:" in done.stdout and "File too large" in done.stdout
    store = open_store(str(tmp_path / "store"), tmp_path / "scratch")
    assert list(store.versions()) == []
    assert list((tmp_path / "store" / "staging").glob("*")) == []
    store.discard("0" * 32)
    with store.staging() as folder:
        write_fake_adapter(folder, name="b")
        version = fingerprint(folder)
        store.publish(folder, version)
    assert list(store.versions()) == [version]


def test_a_folder_of_copies_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    write_fake_adapter(tmp_path / "a", name="a")
    version = fingerprint(tmp_path / "a")
    location = open_store("memory://copies", tmp_path / "s").publish(tmp_path / "a", version)
    with pytest.raises(StoreUnavailable, match="folder of copies failed"):
        LocalCopies(tmp_path / "file" / "copies", 1 << 20).folder_of(location, version)
    blocked = open_store("memory://copies", tmp_path / "file" / "scratch")
    with pytest.raises(StoreUnavailable):
        blocked.staging().__enter__()


@pytest.mark.parametrize("part", ["store", "incoming", "versions", "staging"])
def test_a_read_only_store_is_told(tmp_path: Path, part: str):
    """Files where folders are wanted, which stops root too."""
    place = tmp_path / "store" if part == "store" else tmp_path / "store" / part
    place.parent.mkdir(exist_ok=True)
    place.write_text("in the way")
    store = open_store(str(tmp_path / "store"), tmp_path / "scratch")
    write_fake_adapter(tmp_path / "a", name="a")
    with pytest.raises(StoreUnavailable, match="store's folder failed"):
        store.receive("0" * 32, "adapter_config.json", io.BytesIO(b"{}"))
        with store.staging() as folder:
            write_fake_adapter(folder, name="a")
            store.publish(folder, fingerprint(folder))
    store.discard("0" * 32)
    place.unlink()
    with store.staging() as folder:
        write_fake_adapter(folder, name="a")
        assert store.publish(folder, fingerprint(folder))
