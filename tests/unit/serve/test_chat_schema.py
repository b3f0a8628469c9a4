"""Bodies of chats."""

from __future__ import annotations

from collections.abc import Iterator

from serve.schemas.chat import ChatMessage


class Whole(str):
    """A text that nobody goes through character by character: for long ones that takes seconds, on the event loop."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("character by character")


def test_a_plain_text_is_not_searched_for_images():
    message = ChatMessage.model_construct(role="user", content=Whole("word " * 9))
    assert not message.has_images and not list(message.urls())
    assert [part.text for part in message.to_message(0, {}).parts] == ["word " * 9]
