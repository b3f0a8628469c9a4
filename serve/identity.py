"""Who asks, and what they may: API keys, their scopes, and the adapters that each may name.

A key reads ``loom_<id>_<secret>``. The registry keeps its sha256 only: a secret of 256 random bits needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeVar

from lora_runtime.errors import CallerError

_KEY = re.compile(r"loom_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
T = TypeVar("T")
_NO_DIGEST = "0" * 64


class Unauthenticated(CallerError):
    """No API key, or none that is valid."""


class Forbidden(CallerError):
    """The API key is valid, and does not reach this far."""


class Scope(StrEnum):
    """What a key lets its holder do; ``admin`` is all of it."""

    INFER = "infer"
    ADAPTERS = "adapters"
    EXPERIMENTS = "experiments"
    MERGES = "merges"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who asks. ``adapters``: patterns (``support-*``) of the names that may be used; None is all of them.

    ``requests_per_minute`` and ``max_concurrent`` are None where nothing is limited.
    """

    id: str
    name: str
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    max_concurrent: int | None = None

    @property
    def actor(self) -> str:
        """How the audit names them."""
        return f"{self.name} ({self.id})" if self.id else self.name

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def check(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if not {scope, Scope.ADMIN} & self.scopes:
            raise Forbidden(f"This API key lacks the scope '{scope}'.", scope=str(scope))

    def check_adapter(self, name: str) -> None:
        """Raises Forbidden where the adapter ``name`` may not be managed."""
        if not self.may_use(name):
            raise Forbidden(f"This API key does not reach an adapter '{name[:128]}'.", param="name")


class Reachable(Mapping[str, T]):
    """Things by the name of their adapter, those that ``identity`` may name; the others are not there."""

    def __init__(self, things: Mapping[str, T], identity: Identity) -> None:
        self._things = things
        self._identity = identity

    def __getitem__(self, name: str) -> T:
        if not self._identity.may_use(name):
            raise KeyError(name)
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._things if self._identity.may_use(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


ANYONE = Identity(id="", name="anyone", scopes=frozenset(Scope))
"""Who asks where no keys are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """An API key as the registry knows it; ``digest`` is its sha256 in hex."""

    identity: Identity
    digest: str = field(repr=False)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new_key() -> tuple[str, str]:
    """A key's id, and the key, which is shown once."""
    identifier = secrets.token_hex(6)
    return identifier, f"loom_{identifier}_{secrets.token_urlsafe(32)}"


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """All keys, as one snapshot. ``read`` gives them from the registry; ``is_required`` whether one is asked for.

    ``check_fresh`` raises where the snapshot is too old to honour a key, which may have been revoked since.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[KeyRecord]],
        *,
        is_required: bool,
        check_fresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._read = read
        self._is_required = is_required
        self._check_fresh = check_fresh
        self._records: Mapping[str, KeyRecord] = MappingProxyType({})

    def reload(self) -> None:
        self._records = MappingProxyType({record.identity.id: record for record in self._read()})

    def identify(self, authorization: str) -> Identity:
        """Who sends this ``Authorization`` header. Raises Unauthenticated, and what ``check_fresh`` raises."""
        if not self._is_required:
            return ANYONE
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("Send your API key as 'Authorization: Bearer loom_…'.")
        self._check_fresh()
        found = _KEY.fullmatch(key.strip())
        record = self._records.get(found[1]) if found else None
        # Compared in any case and in constant time, so that time tells nothing of a digest.
        is_right = hmac.compare_digest(digest_of(key.strip()), record.digest if record else _NO_DIGEST)
        if record is None or not is_right:
            raise Unauthenticated("This API key is not valid.")
        if not record.is_valid(datetime.now(UTC)):
            raise Unauthenticated("This API key has expired or was revoked.")
        return record.identity
