"""Logs: one JSON object a line, with the request's id, and never a prompt, an answer or a key."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the current task works for."""
OURS = ("serve", "lora_runtime")


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def configure(level: str) -> None:
    """Send our own loggers' lines to this process's stderr, which Ray keeps by node and process. Idempotent."""
    # Ray Serve puts a logger of its own in the place of sys.stderr, which would wrap each line.
    handler = logging.StreamHandler(sys.__stderr__)
    fields = {"asctime": "time", "levelname": "level", "name": "logger"}
    handler.setFormatter(
        JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s", rename_fields=fields)
    )
    handler.addFilter(_WithRequestId())
    for name in OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
