"""Adapters that arrive as multipart forms: parts go to disk as they come, then to the store, never into memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from lora_runtime.errors import InvalidRequest, StoreUnavailable
from lora_runtime.folder import CONFIG_NAME, FILES, TENSORS_NAME
from lora_runtime.store.protocol import Store, new_receipt

MAX_FIELDS = 4
TRUE, FALSE = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})

UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": f"{', '.join(FILES)}, by these file names; the last one where labels are.",
                        },
                        "activate": {
                            "type": "boolean",
                            "default": True,
                            "description": "Whether the bare name means this version from now on.",
                        },
                    },
                }
            }
        },
    }
}


@asynccontextmanager
async def received(store: Store, request: Request) -> AsyncIterator[tuple[str, bool]]:
    """The receipt of the adapter's files that a form holds, kept in ``store`` until the context's end, and the form's
    field ``activate``. Raises InvalidRequest, AdapterTooLarge, StoreUnavailable."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise InvalidRequest("Send the adapter's files as multipart/form-data.", param="files")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # Starlette decodes names by whatever codec is named
        raise InvalidRequest("The form's charset must be UTF-8.", param="files")
    receipt = new_receipt()
    try:
        try:
            async with request.form(max_files=len(FILES), max_fields=MAX_FIELDS) as form:
                files, activate = _read(form.multi_items())
                for name, file in files.items():
                    await asyncio.to_thread(store.receive, receipt, name, file.file)
        except MultiPartException as error:
            raise InvalidRequest(f"The form cannot be read: {error.message}", param="files") from error
        except OSError as error:
            raise StoreUnavailable(f"The upload could not be kept: {error.strerror}.", retry_after_s=5) from error
        yield receipt, activate
    finally:
        await asyncio.to_thread(store.discard, receipt)


def _read(items: list[tuple[str, UploadFile | str]]) -> tuple[dict[str, UploadFile], bool]:
    files: dict[str, UploadFile] = {}
    activate = True
    for field, value in items:
        if isinstance(value, UploadFile):
            name = value.filename or ""
            if name not in FILES or name in files:
                raise InvalidRequest(
                    f"'{name[:64]}' is no file of an adapter, or is there twice; send {', '.join(FILES)}.",
                    param="files",
                )
            files[name] = value
        elif field == "activate" and value.lower() in TRUE | FALSE:
            activate = value.lower() in TRUE
        else:
            raise InvalidRequest("Beside files, a form takes the field 'activate', true or false.", param="activate")
    for name in (CONFIG_NAME, TENSORS_NAME):
        if name not in files:
            raise InvalidRequest(f"The form lacks the file {name}.", param="files")
    return files, activate
