"""Settings for every test process and the processes it starts."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from hypothesis import settings
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

# No test is timed: a busy machine finds no faults.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
