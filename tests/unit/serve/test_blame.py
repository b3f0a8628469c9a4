"""Whose fault it is that an adapter's files cannot be read: the store's when it is registered, the caller's when it is
being registered."""

from __future__ import annotations

import pickle

import pytest

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import (
    AdapterLost,
    AdapterMissing,
    ContextOverflow,
    LoomError,
    MalformedAdapter,
    NotFound,
    Overloaded,
)
from serve.engine_client import blamed
from serve.gateway.dispatch import FALLS_BACK
from serve.gateway.errors import error_body

REFS = tuple(AdapterRef(version=digit * 64, path=f"/{digit}", name=name) for digit, name in (("1", "a"), ("2", "b")))


@pytest.mark.parametrize("error", [AdapterMissing("There is no file."), MalformedAdapter("It is no JSON.")])
def test_files_of_a_registered_adapter_are_the_stores_fault(error: LoomError):
    lost = blamed(error, REFS)
    status, body = error_body(lost)
    assert (status, body.error.type, body.error.code) == (503, "server_error", "adapter_lost")
    for said in ("'a' (version 111111111111)", "'b' (version 222222222222)", error.message):
        assert said in lost.message
    assert isinstance(lost, FALLS_BACK), "another arm of an experiment may be served instead"
    assert isinstance(pickle.loads(pickle.dumps(lost)), AdapterLost)


@pytest.mark.parametrize("error", [NotFound("no head"), ContextOverflow("too long"), Overloaded("busy")])
def test_other_errors_stay_what_they_are(error: LoomError):
    assert blamed(error, REFS) is error


def test_files_that_are_being_registered_are_the_callers_fault():
    assert error_body(AdapterMissing("There is no file."))[0] == 404
    assert error_body(MalformedAdapter("It is no JSON."))[0] == 400
