"""What may be registered: folders below the roots, addresses below the prefixes, and nothing beside them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from lora_runtime.errors import (
    AdapterMissing,
    AdapterTooLarge,
    InvalidRequest,
    LoomError,
    MalformedAdapter,
    StoreUnavailable,
)
from lora_runtime.folder import CONFIG_NAME, TENSORS_NAME, fingerprint
from lora_runtime.store.sources import Sources
from tests.fakes import write_fake_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_fake_adapter(tmp_path / "root" / "a", name="a")
    write_fake_adapter(tmp_path / "secret", name="secret")
    return tmp_path / "root"


def fetched(sources: Sources, source: str, into: Path) -> Path:
    into.mkdir()
    sources.fetch(source, into)
    return into


def test_an_allowed_folder_is_copied_with_its_own_files_only(root: Path, tmp_path: Path):
    (root / "a" / "optimizer.pt").write_bytes(b"large")
    sources = Sources([root], max_bytes=1000)
    for number, spelled in enumerate((str(root / "a"), f"file://{root}/a", f"{root}/b/../a")):
        copy = fetched(sources, spelled, tmp_path / f"copy{number}")
        assert fingerprint(copy) == fingerprint(root / "a") == sources.version_in_place(spelled)
        assert sorted(path.name for path in copy.iterdir()) == [CONFIG_NAME, TENSORS_NAME]


@pytest.mark.parametrize(
    "spelled",
    [
        "{root}/../secret", "/etc", "/", "", ".", "{root}/link", "{root}", "file:///etc", "local:///etc", "~root",
        "http://127.0.0.1/a", "https://example.com/a", "ftp://example.com/a", "s3://ours", "s3://ours/adapters2/a",
        "s3://ours/adapters/../secret", "s3://ours/adapters//a", "s3://other/adapters/a", "hf://them/model",
        "s3://ours/adapters@a", "hf://us@main", "hf://us/model2@main", "memory://x", "a\0b",
        "filecache::s3://ours/adapters/a", "simplecache::file:///etc",
        "zip://a::file:///etc/x.zip", "github://a:b@c/d", "data:text/plain,x", "reference://x", "dir:///etc",
    ],
)  # fmt: skip
def test_other_places_are_refused(root: Path, tmp_path: Path, spelled: str):
    (root / "link").symlink_to(tmp_path / "secret")
    sources = Sources([root], ["s3://ours/adapters", "hf://us/model"], max_bytes=1000)
    source = spelled.replace("{root}", str(root))
    for call in (sources.version_in_place, lambda s: fetched(sources, s, tmp_path / "copy")):
        with pytest.raises((InvalidRequest, AdapterMissing)) as refused:
            call(source)
        assert str(tmp_path / "secret") not in refused.value.message
    assert not any((tmp_path / "copy").iterdir())


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_links_out_of_the_roots_are_not_followed_and_links_inside_are(root: Path, tmp_path: Path, name: str):
    sources = Sources([root], max_bytes=1000)
    (root / "a" / name).rename(root / "blob")
    (root / "a" / name).symlink_to(root / "blob")
    assert sources.version_in_place(str(root / "a")) == fingerprint(fetched(sources, str(root / "a"), tmp_path / "c"))
    (root / "a" / name).unlink()
    (root / "a" / name).symlink_to(tmp_path / "secret" / name)
    with pytest.raises(InvalidRequest, match="outside"):
        sources.version_in_place(str(root / "a"))
    with pytest.raises(InvalidRequest, match="outside"):
        fetched(sources, str(root / "a"), tmp_path / "d")


def test_what_is_no_regular_file_is_not_opened(root: Path, tmp_path: Path):
    (root / "a" / "config.json").unlink(missing_ok=True)
    os.mkfifo(root / "a" / "config.json")
    with pytest.raises(AdapterMissing, match="no regular file"):
        fetched(Sources([root], max_bytes=1000), str(root / "a"), tmp_path / "c")


def test_too_many_bytes_are_refused_as_soon_as_they_are_too_many(root: Path, tmp_path: Path):
    with open(root / "a" / TENSORS_NAME, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterTooLarge, match="more than 1000 bytes"):
        fetched(Sources([root], max_bytes=1000), str(root / "a"), tmp_path / "c")


def test_a_disk_that_is_full_is_no_fault_of_the_adapter(root: Path, tmp_path: Path):
    (root / "a" / TENSORS_NAME).write_bytes(b"x" * 100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(StoreUnavailable, match="could not be copied"):
            fetched(Sources([root], max_bytes=1 << 20), str(root / "a"), tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_pickles_are_named_not_read(root: Path, tmp_path: Path):
    (root / "a" / TENSORS_NAME).rename(root / "a" / "adapter_model.bin")
    with pytest.raises(MalformedAdapter, match="pickle"):
        fetched(Sources([root], max_bytes=1000), str(root / "a"), tmp_path / "c")


def test_allowed_addresses_are_fetched(s3, bucket: str, root: Path, tmp_path: Path):
    import s3fs

    remote = s3fs.S3FileSystem(**s3)
    remote.put(f"{root}/a", f"{bucket}/adapters/a", recursive=True)
    remote.pipe_file(f"{bucket}/adapters/pickled/adapter_model.bin", b"x")
    remote.pipe_file(f"{bucket}/adapters/pickled/{CONFIG_NAME}", b"{}")
    sources = Sources([], [f"{bucket}/adapters/"], max_bytes=1000, options={"s3": s3})
    assert sources.version_in_place(f"{bucket}/adapters/a") is None
    assert fingerprint(fetched(sources, f"{bucket}/adapters/a/", tmp_path / "c")) == fingerprint(root / "a")
    for name, error in (("none", AdapterMissing), ("pickled", MalformedAdapter)):
        with pytest.raises(error):
            fetched(sources, f"{bucket}/adapters/{name}", tmp_path / name)
    small = Sources([], [bucket], max_bytes=5, options={"s3": s3})
    with pytest.raises(AdapterTooLarge):
        fetched(small, f"{bucket}/adapters/a", tmp_path / "d")


def test_a_revision_of_an_allowed_repository_is_allowed():
    sources = Sources([], ["hf://us/model"], max_bytes=5)
    assert all(sources.folder(f"hf://us/model{rest}") is None for rest in ("", "/", "@main", "@3f9a/lora", "/lora"))


def test_an_address_that_does_not_answer_is_no_fault_of_the_request(tmp_path: Path):
    gone = {"key": "x", "secret": "x", "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    gone["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    with pytest.raises(LoomError, match="object store failed"):
        fetched(Sources([], ["s3://b"], max_bytes=5, options={"s3": gone}), "s3://b/a", tmp_path / "c")


def test_a_refusal_names_what_is_allowed_and_no_preloaded_folder(root: Path, tmp_path: Path):
    sources = Sources([root], ["s3://ours/adapters"], max_bytes=1000, preloaded=[tmp_path / "private"])
    with pytest.raises(InvalidRequest, match=r"adapters\.roots") as found:
        sources.folder("/etc")
    assert str(root) in str(found.value) and "private" not in str(found.value)
    with pytest.raises(InvalidRequest, match="s3://ours/adapters"):
        sources.folder("s3://other/a")
    with pytest.raises(InvalidRequest, match="none is set"):
        Sources([], max_bytes=1000).folder("/etc")
    many = Sources([tmp_path / str(number) for number in range(20)], max_bytes=1000)
    with pytest.raises(InvalidRequest, match="and 12 more"):
        many.folder("/etc")


def test_a_preloaded_folder_may_be_registered(root: Path, tmp_path: Path):
    sources = Sources([], max_bytes=1000, preloaded=[root / "a"])
    assert fingerprint(fetched(sources, str(root / "a"), tmp_path / "copy")) == fingerprint(root / "a")
