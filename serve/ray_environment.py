"""What Ray and transformers read from the environment when they are imported. Imports neither."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

MESSAGE_BYTES = 256 << 20
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where Ray on Windows and macOS listens on loopback only, it does so by this switch; it works on Linux as well."""
PROXY_CALLBACK = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.proxy.middlewares")
"""Has Ray Serve's proxies bound what arrives, and drop headers that steer Ray: the variable, and its value."""
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def prepare(*, is_local: bool) -> None:
    """Set the environment of this process and the ones it starts; call it before ``ray`` is imported.

    ``is_local``: a Ray of this process's own will be started. It listens on loopback only, and whoever connects needs a
    token: one of the operator's, or a random one that only this process and its children have. Who reaches Ray's
    ports runs code as the service, whatever keys its HTTP API asks for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # On a busy machine a proxy takes longer to start than Ray's default of 5 s allows.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    os.environ.setdefault(*PROXY_CALLBACK)
    # Requests carry images; Ray's default of 4 MB for messages between replicas is too small for them.
    os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(MESSAGE_BYTES))
    if is_local:
        os.environ[LOOPBACK_ONLY] = "0"
        os.environ.setdefault(AUTH_MODE, "token")
        if os.environ[AUTH_MODE] == "token" and not _has_token():
            os.environ[TOKEN] = secrets.token_urlsafe(32)


def is_loopback_only() -> bool:
    """Whether this process belongs to a Ray that listens on loopback only."""
    return os.environ.get(LOOPBACK_ONLY) == "0"


def _has_token() -> bool:
    return TOKEN in os.environ or TOKEN_PATH in os.environ or (Path.home() / ".ray" / "auth_token").is_file()
