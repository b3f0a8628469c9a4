"""The README's examples are run as they stand, against the demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from lora_runtime.zoo.paths import ADAPTERS
from lora_runtime.zoo.tasks import examples
from tests.served import Served

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(zoo: Served, tmp_path: Path) -> tuple[Served, Path]:
    examples("colour", "heldout", 1)[0].image.save(tmp_path / "picture.png")
    return zoo, tmp_path


def run(command: list[str], zoo: Served, folder: Path, text: str) -> str:
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "LOOM_URL": zoo.url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    here = text.replace("http://127.0.0.1:8000", zoo.url)
    done = subprocess.run(
        command, input=here, capture_output=True, text=True, cwd=folder, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_examples(here):
    zoo, folder = here
    (block,) = blocks("python")
    answers = run([sys.executable, "-"], zoo, folder, block).split("\n")
    assert set(answers[0].split()) <= {"circle", "square", "triangle", "cross"}
    assert set(answers[1].split()) <= {"rouge", "vert", "bleu", "jaune", "violet", "orangé"}
    assert len(answers[0].split()) == len(answers[1].split()) == 4
    assert answers[2:4] == answers[:2], "the combination answers as each of its adapters does"


def test_shell_examples(here):
    zoo, folder = here
    asking, managing, versioning, uploading, classifying, experimenting, merging, keys = blocks("bash")
    example = examples("colour", "heldout", 1)[0]
    answered = run(["bash", "-e"], zoo, folder, asking)
    assert example.question.removeprefix("What colour is at the ") in answered
    assert '"finish_reason":"stop"' in answered
    managed = run(["bash", "-e"], zoo, folder, managing)
    assert "french" in managed
    assert "adapters.roots" in managed  # /adapters/mine is no allowed folder here, and the answer says so
    path = str(ADAPTERS["shape"])
    mine = httpx.post(f"{zoo.url}/v1/adapters", json={"name": "mine", "path": path}, timeout=60).json()
    versioned = run(["bash", "-e"], zoo, folder, versioning.replace("3f9a12", mine["version"][:6]))
    assert f"mine@latest means {mine['version'][:12]}" in versioned
    for file in ADAPTERS["french"].glob("adapter_*"):
        shutil.copy(file, folder)
    uploaded = json.loads(run(["bash", "-e"], zoo, folder, uploading))
    assert (uploaded["id"], uploaded["num_versions"]) == ("mine", 2)
    httpx.delete(f"{zoo.url}/v1/adapters/mine")
    assert '"label":' in run(["bash", "-e"], zoo, folder, classifying)
    experimented = run(["bash", "-e"], zoo, folder, experimenting)
    assert "x-variant: " in experimented.lower() and '"counts":true' in experimented
    assert "rolled_back; it can archive" in experimented and "error_rate" in experimented
    merged = run(["bash", "-e"], zoo, folder, merging)
    assert "1 tasks of" in merged and re.search(r"merge_[0-9a-f]{16} is under way", merged) and "skills" in merged
    made = run(["loom", "keys", "create", "x", "-s", "infer"], zoo, folder, "").strip()
    shown = run(["bash", "-e"], zoo, folder, keys.replace("3f9a12b4c5d6", made.split("_")[1]) + "\nloom keys ls\n")
    assert re.search(r"^loom_[0-9a-f]{12}_", shown) and "revoked" in shown and "shop-*" in shown


def test_the_chat_command(here):
    zoo, folder = here
    example = examples("colour", "heldout", 1)[0]
    command = ["loom", "chat", "--image", "picture.png", example.question, "--url", zoo.url]
    assert run(command, zoo, folder, "").strip() == example.answer
