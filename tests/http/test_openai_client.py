"""The official client, unchanged, against a real service."""

from __future__ import annotations

import base64

import openai
import pytest

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG and so on").decode()


def ask(client: openai.OpenAI, model: str, text: str = "two words", **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "animals", "french", "shape"]
    assert client.models.retrieve("shape").id == "shape"
    assert client.models.retrieve("shape:0.7+french:0.3").id == "french:0.3+shape:0.7"


@pytest.mark.parametrize(
    ("model", "first"),
    [
        ("base", "base"),
        ("shape", "shape:1"),
        ("shape:0.7+french:0.3", "shape:0.7+french:0.3"),
        (" french : -0.5 + shape:1e-1 ", "french:-0.5+shape:0.1"),
    ],
)
def test_the_model_string_chooses_the_target(client, model, first):
    assert ask(client, model).choices[0].message.content.split()[0] == first


def test_adapters_may_be_a_field(client):
    extra = {"adapters": [{"id": "shape", "weight": 0.25}, {"id": "french"}]}
    answer = ask(client, "base", extra_body=extra)
    assert answer.choices[0].message.content.split()[0] == "shape:0.25+french:1"
    assert answer.model == "french+shape:0.25"


def test_usage_and_finish_reason(client):
    answer = ask(client, "base", max_tokens=2)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.choices[0].finish_reason == "length"
    assert ask(client, "base").choices[0].finish_reason == "stop"


def test_a_stream_adds_up_to_the_whole_answer(client):
    whole = ask(client, "shape").choices[0].message.content
    chunks = list(ask(client, "shape", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_choices(client):
    answer = ask(client, "base", n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 9


def test_stop_strings_are_not_shown(client):
    assert ask(client, "base", "one two three", stop=["two"]).choices[0].message.content == "base one "


def test_log_probabilities(client):
    content = ask(client, "base", logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert content[0].token == "base"
    assert content[0].bytes == list(b"base")
    assert content[0].top_logprobs[0].logprob == -0.5


def test_images_in_any_position(client):
    parts = [
        {"type": "text", "text": "before"},
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "text", "text": "after"},
    ]
    answer = client.chat.completions.create(model="base", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "base before <image> after "


def test_completions(client):
    answer = client.completions.create(model="french", prompt=["a b", "c"], max_tokens=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["french:1 a ", "french:1 c "]
    assert answer.choices[0].logprobs.tokens == ["french:1", "a"]
    assert client.completions.create(model="base", prompt=[7, 8]).choices[0].text.startswith("base 7 8")
    streamed = client.completions.create(model="base", prompt="a b", max_tokens=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "base a b "


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="Did you mean french"):
        ask(client, "frensh")
    with pytest.raises(openai.BadRequestError, match="nan"):
        ask(client, "french:nan")
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(client, "base", tools=[{"type": "function", "function": {"name": "f"}}])


def test_an_error_after_the_first_byte_is_an_event_of_its_own(client):
    with pytest.raises(openai.APIError, match="as it was told to"):
        for _ in ask(client, "base", "fail now please", stream=True):
            pass
