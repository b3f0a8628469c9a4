"""What every JSON body must be before it is parsed for good: bounded in structure, and made of valid text.

Parsing and validating hold the interpreter's lock, so no thread helps: what would take long has to be refused. Counting
bytes is cheap and comes first; then the values are walked, which are few by then.
"""

from __future__ import annotations

import json
from typing import Any

from lora_runtime.errors import InvalidRequest

MAX_STRUCTURE = 1 << 18
"""Of the characters ``,``, ``:``, ``[`` and ``{``, in strings too. A prompt of 131,072 token ids has half as many."""
MAX_DEPTH = 64
MAX_DIGITS = 64
"""Of an integer: converting takes time that grows with the square of the digits."""
MAX_KEYS = 512
"""Of one object. Each unknown key is an error of its own to pydantic."""
MAX_SHOWN = 200


class InvalidJson(InvalidRequest):
    """The body is not JSON, or not in UTF-8."""


class BodyTooComplex(InvalidRequest):
    """The body has more values, deeper nesting or longer numbers than any request needs."""


class InvalidText(InvalidRequest):
    """A string holds what is not a character, or one that cannot be stored."""


def check_json(body: bytes, *, allows_nul: bool) -> None:
    """Raises InvalidJson, BodyTooComplex or InvalidText; the latter two name the field. An empty body passes.

    ``allows_nul``: whether strings may hold U+0000, which PostgreSQL does not store.
    """
    structure = sum(body.count(character) for character in b",:[{")
    if structure > MAX_STRUCTURE:
        raise BodyTooComplex(
            f"The body has {structure} of the characters , : [ and {{; at most {MAX_STRUCTURE} are accepted."
        )
    if body:
        _check_values(_parsed(body), allows_nul)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"), parse_int=_integer)
    except UnicodeDecodeError as error:
        raise InvalidJson("The body is not valid UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InvalidJson(f"The body is not valid JSON at character {error.pos}: {error.msg}.") from error
    except RecursionError as error:
        raise BodyTooComplex(f"The body is nested deeper than {MAX_DEPTH} levels.") from error


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BodyTooComplex(f"The body holds an integer of more than {MAX_DIGITS} digits.")
    return int(digits)


def _check_values(parsed: Any, allows_nul: bool) -> None:
    level, depth = [parsed], 0
    while level:
        if depth > MAX_DEPTH:
            raise BodyTooComplex(f"The body is nested deeper than {MAX_DEPTH} levels.")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if problem := _problem(value, allows_nul):
                    where = _where(parsed, value)
                    raise InvalidText(f"{where}: {problem}", param=where)
            elif isinstance(value, list):
                below += [item for item in value if isinstance(item, str | list | dict)]
            elif isinstance(value, dict):
                _check_keys(parsed, value, allows_nul)
                below += [item for item in value.values() if isinstance(item, str | list | dict)]
        level, depth = below, depth + 1


def _check_keys(parsed: Any, value: dict[str, Any], allows_nul: bool) -> None:
    if len(value) > MAX_KEYS:
        where = _where(parsed, value)
        raise BodyTooComplex(f"{where}: {len(value)} keys in one object; at most {MAX_KEYS} are accepted.", param=where)
    for key in value:
        if problem := _problem(key, allows_nul):
            where = _where(parsed, value)
            raise InvalidText(f"{where}: the key {_ascii(key)}: {problem}", param=where)


def _problem(text: str, allows_nul: bool) -> str | None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"character {error.start} is an unpaired UTF-16 surrogate; send valid Unicode text."
    if not allows_nul and "\0" in text:
        return f"character {text.index(chr(0))} is U+0000, which is not accepted here."
    return None


def _where(parsed: Any, sought: Any) -> str:
    """The path of ``sought``, the object itself, in ``parsed``: ``messages[0].content``. Walked for errors only."""
    waiting = [("", parsed)]
    while waiting:
        path, value = waiting.pop()
        if value is sought:
            return path.lstrip(".") or "body"
        if isinstance(value, list):
            waiting += [(f"{path}[{index}]"[:MAX_SHOWN], item) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            waiting += [(f"{path}.{_ascii(key)}"[:MAX_SHOWN], item) for key, item in value.items()]
    return "body"


def _ascii(text: str) -> str:
    """What is wrong may be the text itself."""
    return text[:MAX_SHOWN].encode("ascii", "backslashreplace").decode()
