"""Settings that hold secrets: they show themselves without the secret in reprs, dumps and logs."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, Secret
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")
HIDDEN = "***"
_USER_AND_PASSWORD = re.compile(r"(?<=://)([^:/?#]*):(.*)@")
"""Greedy up to the last "@", since passwords may hold one: hiding too much is the safe side."""
_QUERY_SECRET = re.compile(r"(?<=[?&])([^=&]*(?:pass|secret|token|key|signature)[^=&]*)=([^&#]+)", re.IGNORECASE)


class _Shown(Secret[T]):
    """A secret that says what of it may be shown, and whether that hides anything.

    Subclasses name ``Secret[…]`` once more: pydantic reads the type of the value from their direct bases.
    """

    @property
    def shown(self) -> str:
        return HIDDEN if self.is_secret else ""

    @property
    def is_secret(self) -> bool:
        return bool(self.get_secret_value())

    def _display(self) -> str:
        return self.shown


class SecretUrl(_Shown[str], Secret[str]):
    """A URL whose password is a secret; the rest of it is shown."""

    @property
    def shown(self) -> str:
        """The URL with ``***`` in place of its password and of secrets in its query."""
        without_password = _USER_AND_PASSWORD.sub(rf"\1:{HIDDEN}@", self.get_secret_value())
        return _QUERY_SECRET.sub(rf"\1={HIDDEN}", without_password)

    @property
    def is_secret(self) -> bool:
        """Whether anything in it is hidden."""
        return self.shown != self.get_secret_value()


class SecretOptions(_Shown[dict[str, Any]], Secret[dict[str, Any]]):
    """Options of a file system, which may hold credentials, so none of them is shown."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = super().__get_pydantic_core_schema__(source, handler)
        return core_schema.no_info_before_validator_function(_from_json, schema)


class SecretText(_Shown[str], Secret[str]):
    """A secret as a whole."""


def _from_json(value: Any) -> Any:
    """Options in an environment variable or a file of a secret are JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("must be a JSON object") from None


SECRETS = (SecretUrl, SecretOptions, SecretText)
