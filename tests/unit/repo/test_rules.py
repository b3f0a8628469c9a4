"""Rules of the repository that a reader relies on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = [*ROOT.glob("lora_runtime/**/*.py"), *ROOT.glob("serve/**/*.py")]
MAX_LINES = 420


def test_files_fit_on_a_few_screens():
    long = {str(f.relative_to(ROOT)): n for f in SOURCES if (n := len(f.read_text().splitlines())) > MAX_LINES}
    assert not long


def test_no_file_is_without_a_docstring():
    assert not [str(f) for f in SOURCES if not re.match(r'\s*("""|#!)', f.read_text())]


def test_nothing_is_unpickled():
    forbidden = re.compile(r"\b(torch\.load|pickle\.loads?|yaml\.load\(|eval\(|exec\()")
    assert not [str(f) for f in SOURCES if forbidden.search(re.sub(r"\.eval\(\)", "", f.read_text()))]


def test_the_import_rules_hold():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
