"""The registry: what is written is there, in every process, after every restart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_runtime.errors import Conflict, NotFound
from serve.registry.repository import Repository


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'deep' / 'registry.db'}"


def test_adapters_come_and_go(url):
    repository = Repository(url)
    record, is_new = repository.add("a", "1" * 64, "/a", {"rank": 4})
    assert is_new
    assert repository.adapters() == [record]
    with pytest.raises(Conflict, match="other content"):
        repository.add("a", "2" * 64, "/a", {})
    assert repository.add("a", "1" * 64, "/b", {})[1] is False
    assert repository.adapters()[0].path == "/b"
    assert repository.add("a", "2" * 64, "/c", {}, replace=True)[0].version == "2" * 64
    repository.remove("a")
    with pytest.raises(NotFound):
        repository.remove("a")
    assert repository.adapters() == []


def test_the_revision_moves_with_changes_only(url):
    repository = Repository(url)
    before = repository.revision()
    repository.adapters()
    with pytest.raises(NotFound):
        repository.remove("ghost")
    assert repository.revision() == before
    repository.add("a", "1" * 64, "/a", {})
    assert repository.revision() > before


def test_another_process_sees_it_and_so_does_the_next(url):
    first, second = Repository(url), Repository(url)
    first.add("a", "1" * 64, "/a", {})
    assert [record.name for record in second.adapters()] == ["a"]
    first.close()
    assert [record.name for record in Repository(url).adapters()] == ["a"]


def test_writers_at_once_lose_nothing(url):
    Repository(url)

    def write(number: int) -> None:
        repository = Repository(url)
        repository.add(f"a{number}", f"{number:064d}", "/a", {})
        repository.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert len(Repository(url).adapters()) == 24
    assert Repository(url).revision() == 24
