"""Results of merges that are there as a whole or not at all, in folders and in buckets."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.errors import Conflict
from lora_runtime.merge.workspace import Site, Workspace
from tests.unit.store.conftest import Place


def workspace(place: Place, name: str = "merged", identifier: str = "1" * 32) -> Workspace:
    site = Site(root=place.url, name=name, id=identifier, scratch=str(place.scratch), options=place.options)
    return site.open()


def write(into: Workspace, file: str, content: str) -> None:
    with into.writing(file) as path:
        path.write_text(content)


def test_a_result_is_there_once_it_is_published(place: Place):
    made = workspace(place)
    write(made, "a.safetensors", "one")
    write(made, "templates/config.json", "two")
    assert made.published() is None
    made.keep("a", {"sha256": "x"})
    assert workspace(place).record("a") == {"sha256": "x"} and made.record("b") is None
    with made.reading("a.safetensors") as path:
        assert path.read_text() == "one"
    with made.result() as folder:
        assert {"a.safetensors", "config.json"} <= {file.name for file in folder.rglob("*")}
    write(made, "part", "of it")
    made.remove("part")
    made.remove("part")
    made.publish({"job": "me"})
    found = workspace(place, identifier="2" * 32).published()
    assert found is not None and found["job"] == "me" and made.location.startswith(place.url)
    made.discard()
    assert made.record("a") is None and made.published() == found
    if not place.options:
        assert {file.name for file in Path(made.location).rglob("*") if file.is_file()} == {
            "a.safetensors", "config.json", "manifest.json",
        }  # fmt: skip


def test_a_name_that_is_taken_is_left_alone(place: Place):
    first, second = workspace(place), workspace(place, identifier="2" * 32)
    write(first, "a", "first")
    write(second, "a", "second")
    first.publish({"job": "first"})
    with pytest.raises(Conflict, match="'merged' exists already"):
        second.publish({"job": "second"})
    second.discard()
    assert (first.published() or {})["job"] == "first"


def test_what_is_discarded_leaves_nothing(place: Place, tmp_path: Path):
    made, other = workspace(place), workspace(place, "other", "2" * 32)
    write(made, "a", "one")
    made.keep("a", {})
    write(other, "a", "other")
    made.discard()
    assert made.record("a") is None and made.published() is None
    with other.reading("a") as path:
        assert path.read_text() == "other"
    other.discard()
    if place.options:
        import s3fs

        assert s3fs.S3FileSystem(**place.options).find(place.url) == []
    else:
        assert list(Path(place.url).rglob("*")) == []


def test_what_fails_while_it_is_written_is_not_there(place: Place):
    made = workspace(place)
    write(made, "b", "whole")
    with pytest.raises(RuntimeError), made.writing("a") as path:
        path.write_text("half")
        raise RuntimeError
    with made.result() as folder:
        assert [file.name for file in folder.iterdir()] == ["b"]
    made.discard()


def test_a_folder_that_is_no_result_is_told_from_none(place: Place):
    if place.options:
        pytest.skip("a bucket has no folders")
    (Path(place.url) / "merged").mkdir(parents=True)
    assert workspace(place).published() == {}
    with pytest.raises(Conflict):
        workspace(place).publish({})
