"""A version that the store has damaged is the service's fault; what a client has just sent stays the client's."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import AdapterMissing, MalformedAdapter, StoreUnavailable, UnsupportedAdapter, VersionDamaged
from lora_runtime.folder import fingerprint
from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.factory import open_store
from serve.config import Settings
from serve.damage import store_answers_for
from serve.gateway.errors import error_body
from serve.handover import handed_over
from serve.identity import Scope
from serve.replica import EngineReplica
from tests.fakes import EMPTY_TENSORS, write_fake_adapter
from tests.gateways import gateway

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def flipped(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS).write_bytes(content)


HARMS: list[Callable[[Path], object]] = [
    flipped,
    lambda folder: (folder / TENSORS).write_bytes(EMPTY_TENSORS[:-1]),
    lambda folder: (folder / TENSORS).unlink(),
    lambda folder: (folder / CONFIG).unlink(),
    lambda folder: (folder / CONFIG).write_text("{"),
    lambda folder: (folder / CONFIG).write_text('{"name": "other"}'),
    lambda folder: shutil.rmtree(folder),
]


def registered(folder: Path) -> AdapterRef:
    write_fake_adapter(folder, name="a", head=True)
    return AdapterRef(version=fingerprint(folder), path=str(folder), name="a")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("error", [MalformedAdapter("cut short"), AdapterMissing("gone")])
async def test_damage_of_a_registered_version_is_ours(tmp_path: Path, harm, error: Exception):
    ref, sound = registered(tmp_path / "a"), registered(tmp_path / "b")
    harm(tmp_path / "a")
    with pytest.raises(VersionDamaged, match=f"'a@{ref.version[:12]}'.*register or upload") as told:
        async with store_answers_for([sound, ref], LocalCopies(tmp_path / "copies", 1)):
            raise error
    assert told.value.facts["version"] == ref.version
    assert error_body(told.value)[0] == 500 and error_body(told.value)[1].error.type == "server_error"
    assert isinstance(pickle.loads(pickle.dumps(told.value)), VersionDamaged)


async def test_an_error_about_sound_files_passes(tmp_path: Path):
    with pytest.raises(UnsupportedAdapter):
        async with store_answers_for([registered(tmp_path / "a")], LocalCopies(tmp_path / "copies", 1)):
            raise UnsupportedAdapter("larger than max_materialised_bytes")


async def test_a_damaged_copy_of_a_bucket_is_fetched_again(tmp_path: Path):
    write_fake_adapter(tmp_path / "a", name="a")
    version = fingerprint(tmp_path / "a")
    store, copies = open_store("memory://damage", tmp_path / "scratch"), LocalCopies(tmp_path / "copies", 1 << 20)
    location = store.publish(tmp_path / "a", version)
    ref = AdapterRef(version=version, path=location, name="a")
    flipped(copies.folder_of(location, version))
    with pytest.raises(StoreUnavailable, match="fetched again"):
        async with store_answers_for([ref], copies):
            raise MalformedAdapter("cut short")
    assert fingerprint(copies.folder_of(location, version)) == version


@pytest.mark.parametrize("url", ["{folder}/store", "memory://repaired"])
def test_publishing_again_repairs_an_entry(tmp_path: Path, url: str):
    store, copies = open_store(url.format(folder=tmp_path), tmp_path / "scratch"), LocalCopies(tmp_path / "c", 1 << 20)

    def publish() -> tuple[str, str]:
        with store.staging() as staged:
            write_fake_adapter(staged, name="a")
            version = fingerprint(staged)
            return version, store.publish(staged, version)

    version, location = publish()
    if url.startswith("memory"):
        import fsspec

        fsspec.filesystem("memory").pipe_file(f"{location}/{TENSORS}", b"damaged")
        with pytest.raises(MalformedAdapter):
            copies.folder_of(location, version)
    else:
        flipped(Path(location))
    assert publish() == (version, location)
    assert fingerprint(copies.folder_of(location, version)) == version


async def test_a_replica_tells_damage_and_serves_the_others(tmp_path: Path):
    from lora_runtime.engine.protocol import ClassifyRequest, TextPrompt

    bad, good = registered(tmp_path / "a"), registered(tmp_path / "b")
    (tmp_path / "a" / CONFIG).unlink()
    settings = Settings.model_validate({"state_dir": str(tmp_path / "state"), "engine": {"kind": "fake"}})
    replica = EngineReplica(handed_over(settings))
    await replica.check_health()

    def asked(ref: AdapterRef) -> ClassifyRequest:
        return ClassifyRequest(request_id="r", prompt=TextPrompt(text="hi"), adapters=(ref,), head=None, timeout_s=5.0)

    with pytest.raises(VersionDamaged):
        await replica.classify(asked(bad))
    assert (await replica.classify(asked(good))).labels
    await replica.__del__()


async def test_what_a_client_sends_damaged_stays_its_own_fault(tmp_path: Path):
    async with gateway(tmp_path, {"adapters": {"preload": {}}}) as running, running.client(Scope.ADMIN) as client:
        files = [("files", (CONFIG, b"{")), ("files", (TENSORS, EMPTY_TENSORS))]
        refused: httpx.Response = await client.post("/v1/adapters/up/versions", files=files)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "malformed_adapter"
