"""``loom merge`` on a Ray of its own: killed in the middle it goes on where it was, and what cannot be done is told."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml
from moto.server import ThreadedMotoServer
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from lora_runtime.zoo.paths import ADAPTERS, BASE
from serve.registry.database import Database
from serve.registry.merges import Merges
from tests.cluster.merging import build_adapter, build_base
from tests.oracle.jobs import deltas_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def started(folder: Path, state: Path, recipe: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return subprocess.Popen(
        [sys.executable, "-m", "serve.cli", "merge", str(folder / "recipe.yaml"), *options],
        env={**os.environ, "LOOM_STATE_DIR": str(state), "COLUMNS": "200"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    return output


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("large")
    build_base(folder / "base", 4, "60MB")
    yield folder / "base", build_adapter(folder / "adapter", folder / "base", seed=1)


def test_killed_in_the_middle_it_goes_on_where_it_was(large: tuple[Path, Path], tmp_path: Path, state: Path):
    base, adapter = large
    recipe = {
        "product": "checkpoint", "method": "linear", "inputs": [{"adapter": str(adapter)}],
        "verify": {"probes": False},
    }  # fmt: skip
    options = ("--base", str(base), "--out", str(tmp_path / "merged"))
    first = started(tmp_path, state, recipe, *options)
    records = tmp_path / ".staging"
    deadline = time.monotonic() + 200
    while len(done := list(records.glob("*/records/*.json"))) < 2:
        assert first.poll() is None and time.monotonic() < deadline, ended(first)
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    known = {path.name: json.loads(path.read_text())["pid"] for path in done}
    assert not (tmp_path / "merged").exists()
    output = ended(started(tmp_path, state, recipe, *options))
    assert "Made" in output and (tmp_path / "merged" / "manifest.json").is_file(), output
    merges = Merges(Database(f"sqlite:///{state / 'registry.db'}"))
    (job,) = merges.all()
    assert job.fence > 1 and any("done before" in line.message for line in merges.log(job.id))
    nodes = {f"{unit.unit}.json": unit.node for unit in merges.units(job.id)}
    assert all(nodes[name].endswith(f"/{pid}") for name, pid in known.items()), "what was done was not done again"
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    for file, told in manifest["files"].items():
        with open(tmp_path / "merged" / file, "rb") as opened:
            assert hashlib.file_digest(opened, "sha256").hexdigest() == told["sha256"]
    assert not records.exists()


def test_an_adapter_is_made_in_a_folder_that_peft_loads(tmp_path: Path, state: Path):
    recipe = {
        "name": "both", "method": "svd", "rank": 12, "dtype": "bfloat16",
        "inputs": [{"adapter": str(ADAPTERS["shape"])}, {"adapter": str(ADAPTERS["french"]), "weight": 0.5}],
    }  # fmt: skip
    planned = ended(started(tmp_path, state, recipe, "--plan"))
    assert "1 tasks of" in planned and not list(tmp_path.glob("made*"))
    output = ended(started(tmp_path, state, recipe, "--out", str(tmp_path / "made")))
    assert "Made" in output and "Kept energy" in output and "Verified: KL" in output, output
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(BASE), str(tmp_path / "made"))
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "manifest.json",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    for file, told in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "made" / file).read_bytes()).hexdigest() == told["sha256"]
    assert manifest["inputs"][0]["version"] and manifest["verification"]["probe"]["kl_to_base"] > 0.01
    again = ended(started(tmp_path, state, recipe, "--out", str(tmp_path / "made")))
    assert "'made' exists already" in again


def test_ties_with_a_negative_weight_takes_the_adapter_away(tmp_path: Path, state: Path):
    """-1 of one adapter at full density is that adapter turned round, and it is left out of modules of weight 0."""
    without = [{"modules": "*.mlp.*", "weight": 0}, {"modules": "*", "weight": -1.0}]
    recipe = {
        "name": "less", "method": "ties", "density": 1.0,
        "inputs": [{"adapter": str(ADAPTERS["shape"]), "weight": without}],
    }  # fmt: skip
    output = ended(started(tmp_path, state, recipe, "--out", str(tmp_path / "made")))
    assert "Made" in output and "Verified: KL" in output, output
    given, got = (deltas_of(BASE, folder) for folder in (ADAPTERS["shape"], tmp_path / "made"))
    assert set(got) == {leaf for leaf in given if ".mlp." not in leaf} != set(given)
    for leaf, delta in got.items():
        assert float((delta + given[leaf]).norm()) < 1e-5 * float(given[leaf].norm())


def test_a_checkpoint_in_a_bucket_is_there_once_its_pointer_is(tmp_path: Path, state: Path, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "test", "secret": "test",
        "client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-central-1"},
    }  # fmt: skip
    files = s3fs.S3FileSystem(**options)
    files.mkdir("merges")
    monkeypatch.setenv("LOOM_MERGES__URL", "s3://merges/loom")
    monkeypatch.setenv("LOOM_MERGES__OPTIONS", json.dumps(options))
    recipe = {
        "name": "shapes", "product": "checkpoint", "method": "cat",
        "inputs": [{"adapter": str(ADAPTERS["shape"])}],
    }  # fmt: skip
    output = ended(started(tmp_path, state, recipe))
    assert "Verified: KL" in output, output
    pointer = json.loads(files.cat_file("merges/loom/shapes/manifest.json"))
    folder = f"merges/loom/shapes/{pointer['folder']}"
    assert {Path(name).name for name in files.ls(folder)} == {file.name for file in BASE.iterdir()} | {"manifest.json"}
    for file, told in pointer["files"].items():
        assert hashlib.sha256(files.cat_file(f"{folder}/{file}")).hexdigest() == told["sha256"]
    assert not files.find("merges/loom/.staging")
    merges = Merges(Database(f"sqlite:///{state / 'registry.db'}"))
    assert merges.checkpoint("shapes").location == f"s3://{folder}"
    server.stop()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": [{"adapter": "nobody"}]}, "There is no model or adapter 'nobody'"),
        ({"method": "magic"}, "The recipe cannot be used: method"),
        ({"inputs": [{"adapter": "x", "weight": float("nan")}]}, "The recipe cannot be used: inputs"),
        ({"densty": 1}, "densty"),
        ({"density": 0.5}, "'density' has no effect on 'cat', but on magnitude_prune, ties"),
        (
            {"inputs": [{"adapter": str(ADAPTERS["shape"]), "weight": [{"modules": "*.self_atn.*", "weight": 0.5}]}]},
            "no module of the base matches '*.self_atn.*'. Nearest: '*.self_attn.*'",
        ),
        ({"inputs": [{"adapter": str(ADAPTERS["shape"]), "weight": [{"modules": "*", "weight": 0}]}]}, "weight is 0"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(tmp_path: Path, state: Path, change: dict[str, Any], said: str):
    recipe = {"name": "both", "method": "cat", "inputs": [{"adapter": str(ADAPTERS["shape"])}], **change}
    process = started(tmp_path, state, recipe, "--out", str(tmp_path / "made"))
    output = ended(process)
    assert process.returncode == 1 and said in output and "Traceback" not in output, output
    assert not (tmp_path / "made").exists() and not (tmp_path / ".staging").exists()
