"""What a request means by its model: the base, an adapter, or a weighted combination.

    target   := member ("+" member)*            base | shape | shape:0.7+french:0.3
    member   := name ["@" version] [":" weight]  shape@3f9a12:0.5

Names are letters, digits, ``.``, ``_`` and ``-``; a version is an alias, such as ``prod``, or the beginning of the
content's sha256; a weight is any finite number. The field ``adapters`` of a request says the same as a list.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import InvalidCombination, InvalidRequest, NotFound
from serve.registry.records import SHOWN

BASE = "@base"
"""The base, whatever it is called here; no adapter can have this name."""
MAX_MEMBERS = 16
MAX_WEIGHT = 1e4
MAX_LENGTH = 4096
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ALIAS = re.compile(r"(?![0-9a-fA-F]+$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""No alias reads like the beginning of a version."""
# A weight may hold "+" in its exponent, so the string is read member by member, never split at "+".
_MEMBER = re.compile(
    r"\s*(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<version>[A-Za-z0-9._-]+))?"
    r"(?:\s*:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf(?:inity)?)))?\s*(?P<end>\+|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One adapter as named by a request; ``version`` is an alias, a prefix or None."""

    name: str
    version: str | None = None
    weight: float = 1.0

    def __str__(self) -> str:
        version = "" if self.version is None else f"@{self.version}"
        return f"{self.name}{version}" if self.weight == 1.0 else f"{self.name}{version}:{self.weight!r}"


@dataclass(frozen=True, slots=True)
class Registered:
    """What the registry knows of an adapter that can be served.

    ``versions``: folders by version. ``aliases``: versions by movable name. ``default``: what the bare name means.
    """

    name: str
    default: str
    versions: Mapping[str, str]
    aliases: Mapping[str, str]

    def version(self, asked: str | None) -> str:
        """The version that an alias or the beginning of one means. Raises NotFound naming what there is."""
        if asked is None:
            return self.default
        if asked in self.aliases:
            return self.aliases[asked]
        found = [version for version in self.versions if version.startswith(asked.lower())]
        if len(found) == 1:
            return found[0]
        near = [f"{self.name}@{known}" for known in (*self.aliases, *(v[:SHOWN] for v in found or self.versions))]
        what = f"{len(found)} versions that begin with" if found else "no version or alias"
        raise NotFound(
            f"'{self.name}' has {what} '{asked[:64]}'; there are {', '.join(near[:8])}.", param="model", near=near[:8]
        )


@dataclass(frozen=True, slots=True)
class Target:
    """What a request resolved to. ``label`` is its canonical spelling; no ``adapters`` is the base."""

    label: str
    adapters: tuple[AdapterRef, ...]

    @property
    def exact(self) -> str:
        """A spelling that means the same content ever after; :func:`exact_members` reads it."""
        return canonical([Member(ref.name, ref.version, ref.weight) for ref in self.adapters]) or BASE

    @property
    def served(self) -> str:
        """As :attr:`exact`, with versions shortened for people, and the base by its name."""
        return canonical([Member(ref.name, ref.version[:SHOWN], ref.weight) for ref in self.adapters]) or self.label


def parse(text: str) -> tuple[Member, ...]:
    """Members of a model string other than the base's name. Raises InvalidRequest or InvalidCombination."""
    if len(text) > MAX_LENGTH:
        raise InvalidRequest(f"The model's name is longer than {MAX_LENGTH} characters.", param="model")
    members: list[Member] = []
    position = 0
    while True:
        match = _MEMBER.match(text, position)
        if match is None:
            raise InvalidRequest(
                f"'{text[:200]}' is no model name: from character {position + 1} on it should read like "
                "'name', 'name@version' or 'name:0.7', joined by '+'.",
                param="model",
            )
        members.append(Member(match["name"], match["version"], float(match["weight"] or 1.0)))
        position = match.end()
        if not match["end"]:
            return check_members(members)


def exact_members(exact: str) -> tuple[Member, ...]:
    """Members of :attr:`Target.exact`; none for the base."""
    return () if exact == BASE else parse(exact)


def check_members(members: Sequence[Member]) -> tuple[Member, ...]:
    """Refuse repeated names, too many members and weights that are no sensible number; then drop zero weights."""
    if len(members) > MAX_MEMBERS:
        raise InvalidCombination(f"{len(members)} adapters in one combination; at most {MAX_MEMBERS} are allowed.")
    seen: set[str] = set()
    for member in members:
        if not math.isfinite(member.weight) or abs(member.weight) > MAX_WEIGHT:
            raise InvalidCombination(
                f"The weight of '{member.name}' is {member.weight}; it must be a number of at most {MAX_WEIGHT:g}.",
                param="model",
            )
        if member.name in seen:
            raise InvalidCombination(f"'{member.name}' is named twice; add its weights up.", param="model")
        seen.add(member.name)
    return tuple(member for member in members if member.weight != 0.0)


def canonical(members: Sequence[Member]) -> str:
    """The one spelling of a combination: members sorted, weights in their shortest exact form."""
    return "+".join(str(member) for member in sorted(members, key=lambda m: (m.name, m.version or "")))


def resolve(
    model: str | None, fields: Sequence[Member] | None, base: str, registered: Mapping[str, Registered]
) -> Target:
    """The target of a request's ``model`` and ``adapters``. Raises NotFound naming near ones."""
    if fields is not None:
        if model is not None and model.strip() != base:
            raise InvalidRequest(f"With 'adapters', 'model' must be the base '{base}' or be left out.", param="model")
        members = check_members(fields)
    elif model is None:
        raise InvalidRequest("Name a model, or list 'adapters'.", param="model")
    else:
        members = () if model.strip() in (base, BASE) else parse(model)
    return target_of(members, canonical(members) or base, base, registered)


def target_of(members: Sequence[Member], label: str, base: str, registered: Mapping[str, Registered]) -> Target:
    """What ``members`` are, under the name ``label``. Raises NotFound naming near ones."""
    return Target(label, tuple(_ref(member, base, registered) for member in members))


def _ref(member: Member, base: str, registered: Mapping[str, Registered]) -> AdapterRef:
    found = registered.get(member.name)
    if found is None:
        near = difflib.get_close_matches(member.name, [base, *registered], n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else " GET /v1/models lists them."
        raise NotFound(f"There is no model or adapter '{member.name}'.{hint}", param="model", near=near)
    version = found.version(member.version)
    return AdapterRef(version=version, path=found.versions[version], name=found.name, weight=member.weight)
