"""Adapters that arrive as multipart forms: parts go to disk as they come, then to the store, never into memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Upload:
    """What a form holds: an adapter's files by name, spooled to this machine's disk, and the field ``activate``."""

    files: Mapping[str, UploadFile]
    activate: bool

    async def digest(self) -> bytes:
        """sha256 of the content: names and bytes of the files, and ``activate``. Reads the disk, off the event loop.

        Raises StoreUnavailable.
        """
        try:
            return await asyncio.to_thread(self._digest)
        except OSError as error:
            raise _not_kept(error) from error

    def _digest(self) -> bytes:
        whole = hashlib.sha256(b"activate" if self.activate else b"")
        for name, file in sorted(self.files.items()):
            file.file.seek(0)
            whole.update(hashlib.sha256(name.encode()).digest())
            whole.update(hashlib.file_digest(file.file, "sha256").digest())  # type: ignore[arg-type]  # it has no readinto
            file.file.seek(0)
        return whole.digest()


@asynccontextmanager
async def uploaded(request: Request) -> AsyncIterator[Upload]:
    """The adapter in the request's form, on the disk until the context's end. Raises InvalidRequest, AdapterTooLarge,
    StoreUnavailable."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise InvalidRequest("Send the adapter's files as multipart/form-data.", param="files")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # Starlette decodes names by whatever codec is named
        raise InvalidRequest("The form's charset must be UTF-8.", param="files")
    form = request.form(max_files=len(FILES), max_fields=MAX_FIELDS)
    try:
        parts = await form.__aenter__()
    except MultiPartException as error:
        raise InvalidRequest(f"The form cannot be read: {error.message}", param="files") from error
    except OSError as error:
        raise _not_kept(error) from error
    try:
        yield _read(parts.multi_items())
    finally:
        await form.__aexit__(None, None, None)


@asynccontextmanager
async def kept(store: Store, upload: Upload) -> AsyncIterator[str]:
    """The receipt under which ``store`` has the files until the context's end. Raises StoreUnavailable."""
    receipt = new_receipt()
    try:
        try:
            for name, file in upload.files.items():
                await asyncio.to_thread(store.receive, receipt, name, file.file)
        except OSError as error:
            raise _not_kept(error) from error
        yield receipt
    finally:
        await asyncio.to_thread(store.discard, receipt)


def _not_kept(error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"The upload could not be kept: {error.strerror}.", retry_after_s=5)


def _read(items: list[tuple[str, UploadFile | str]]) -> Upload:
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
    return Upload(files, activate)
