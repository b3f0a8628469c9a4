"""The described API, tried by schemathesis: whatever is sent, nothing is a fault of the service."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.fakes import write_fake_adapter
from tests.served import served

NAMES = ("a", "b")


@pytest.mark.timeout(600)
def test_nothing_that_fits_or_breaks_the_schema_is_answered_with_a_fault(tmp_path: Path):
    for name in NAMES:
        write_fake_adapter(tmp_path / "adapters" / name, name=name)
    (tmp_path / "schemathesis.toml").write_text('[parameters]\n"path.name" = ["a", "b"]\n"path.alias" = "latest"\n')
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake"},
        "adapters": {
            "roots": [str(tmp_path / "adapters")],
            "preload": {name: str(tmp_path / "adapters" / name) for name in NAMES},
        },
    }
    with served(tmp_path, settings) as running:
        done = subprocess.run(
            [
                str(Path(sys.executable).parent / "schemathesis"), f"--config-file={tmp_path / 'schemathesis.toml'}",
                "run", f"{running.url}/openapi.json", "--checks=not_a_server_error", "--max-examples=30", "--seed=1",
                "--phases=examples,coverage,fuzzing,stateful",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:]
        passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert passed and passed[1] == passed[2] and int(passed[1]) > 1000, done.stdout[-2000:]
        assert httpx.get(f"{running.url}/readyz").status_code == 200
