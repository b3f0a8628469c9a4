"""Errors as HTTP answers in OpenAI's shape: the one place where causes become status codes."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora_runtime.errors import (
    AdapterTooLarge,
    CallerError,
    Conflict,
    DeadlineExceeded,
    EngineFault,
    LoomError,
    NotFound,
    Overloaded,
    StoreUnavailable,
)
from serve.engine_client import EngineUnavailable
from serve.gateway.receiving import BodyTimeout, BodyTooLarge
from serve.identity import Forbidden, Unauthenticated
from serve.registry.errors import RegistryStale, RegistryUnavailable
from serve.schemas.common import ErrorBody, ErrorDetail

log = logging.getLogger(__name__)

MAX_SHOWN_PROBLEMS = 3
CLIENT_LEFT = 499
"""What is counted and logged where the client was gone before its answer, as nginx does."""

STATUS: tuple[tuple[type[LoomError], int, str], ...] = (
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (NotFound, 404, "not_found_error"),
    (AdapterTooLarge, 413, "invalid_request_error"),
    (BodyTooLarge, 413, "invalid_request_error"),
    (BodyTimeout, 408, "timeout_error"),
    (CallerError, 400, "invalid_request_error"),
    (Conflict, 409, "conflict_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (Overloaded, 429, "rate_limit_error"),
    (EngineUnavailable, 503, "server_error"),
    (StoreUnavailable, 503, "server_error"),
    (RegistryUnavailable, 503, "server_error"),
    (RegistryStale, 503, "server_error"),
    (EngineFault, 500, "server_error"),
    (LoomError, 500, "server_error"),
)


def error_body(error: LoomError) -> tuple[int, ErrorBody]:
    """The status and body that ``error`` means."""
    status, kind = next((status, kind) for cls, status, kind in STATUS if isinstance(error, cls))
    param = error.facts.get("param")
    code = "model_not_found" if status == 404 and param == "model" else _snake(type(error).__name__)
    return status, ErrorBody(error=ErrorDetail(message=error.message, type=kind, param=param, code=code))


def error_response(error: LoomError) -> JSONResponse:
    status, body = error_body(error)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if (after := error.facts.get("retry_after_s")) is not None:
        headers["Retry-After"] = str(max(1, round(after)))
    if status == 408:
        headers["Connection"] = "close"  # what is left of the body is not waited for
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


def plain_error(status: int, message: str, *, code: str, param: str | None = None) -> JSONResponse:
    """An error that no LoomError stands for: routing, parsing, sizes."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status_code=status)


def install_handlers(app: FastAPI) -> None:
    """Every failure of ``app`` answers in OpenAI's shape."""

    @app.exception_handler(LoomError)
    async def _loom(request: Request, error: LoomError) -> JSONResponse:
        if isinstance(error, EngineFault):
            log.error("engine fault: %s", error.message)
        response = error_response(error)
        if (dispatch := getattr(request.state, "dispatch", None)) is not None:
            response.headers.update(dispatch.headers)  # whose fault it may have been
        return response

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _validation_response(list(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return plain_error(404, f"There is no {request.method} {request.url.path[:200]}.", code="unknown_url")
        if error.status_code == 405:
            return plain_error(
                405, f"{request.url.path[:200]} does not take {request.method}.", code="method_not_allowed"
            )
        return plain_error(error.status_code, str(error.detail), code="http_error")

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error in a request: %s", type(error).__name__, exc_info=error)
        return plain_error(500, "The gateway failed; the fault is logged.", code="internal_error")


def _validation_response(problems: list[dict[str, Any]]) -> JSONResponse:
    """Names fields and what is wrong with them; never echoes values, which can hold prompts."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        return plain_error(400, "The body is not valid JSON.", code="invalid_json")
    described = [(_where(problem["loc"]), _what(problem)) for problem in problems]
    shown = "; ".join(f"{where}: {what}" if where else what for where, what in described[:MAX_SHOWN_PROBLEMS])
    more = f" (and {len(described) - MAX_SHOWN_PROBLEMS} more)" if len(described) > MAX_SHOWN_PROBLEMS else ""
    param = described[0][0] or None
    return plain_error(400, f"{shown}{more}.", code="invalid_value", param=param)


def _where(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location[1:] if location and location[0] == "body" else location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")[:200]


def _what(problem: dict[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:300]


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
