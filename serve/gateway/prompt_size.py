"""How many pieces a prompt may be sent to an engine in.

An engine unpacks a request in one go, while nothing else runs there: a long text costs it next to nothing, a million
small objects cost it seconds. What a prompt's length in tokens may be, engines know and check.
"""

from __future__ import annotations

from lora_runtime.engine.protocol import ChatPrompt, Prompt, TokenPrompt
from lora_runtime.errors import InvalidRequest

MAX_PARTS = 4096
"""Texts and images in all messages of a chat."""
MAX_IDS = 1 << 20
"""More than any context holds."""


def check_pieces(prompt: Prompt) -> None:
    """Raise InvalidRequest for a prompt of too many parts or token ids."""
    if isinstance(prompt, TokenPrompt):
        _check(len(prompt.token_ids), MAX_IDS, "token ids", "prompt")
    elif isinstance(prompt, ChatPrompt):
        _check(sum(len(message.parts) for message in prompt.messages), MAX_PARTS, "parts", "messages")


def _check(number: int, limit: int, what: str, param: str) -> None:
    if number > limit:
        raise InvalidRequest(f"The prompt has {number} {what}; at most {limit} are served.", param=param)
