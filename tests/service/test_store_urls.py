"""Which URLs name a store, and what the others are told."""

import subprocess
import sys
from pathlib import Path

import pytest

from cellserve_service.stores import open_store


@pytest.mark.parametrize("is_relative", [True, False])
async def test_a_sqlite_url_names_a_file_of_the_working_directory_or_any(
    is_relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///my cells.db" if is_relative else f"sqlite:///{tmp_path}/my cells.db"
    store = open_store(url, replica=1, ended_memory_seconds=1)
    assert not (tmp_path / "my cells.db").exists()
    await store.open()
    await store.close()
    assert (tmp_path / "my cells.db").exists()


@pytest.mark.parametrize(
    "url", ["redis://localhost/0", "rediss://user:word@host:7000/1", "unix:///run/redis.sock?db=2"]
)
async def test_a_redis_url_is_one_of_redis_py(url: str) -> None:
    await open_store(url, replica=1, ended_memory_seconds=1).close()


@pytest.mark.parametrize(
    "url",
    [
        *("", "sqlite", "cells.db", "postgres://localhost", "SQLITE", "://", "sqlite:cells.db"),
        *("sqlite://", "sqlite:///", "sqlite://host/cells.db", "sqlite:///folder/", "sqlite:///cells.db?mode=ro"),
        *("sqlite:///:memory:", "sqlite:///a#b"),
        *("redis://host:port", "redis://:pass#word@host", "redis://host?colour=red", "redis://host?socket_timeout=x"),
    ],
)
def test_any_other_url_is_refused_in_one_line_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"^store: [^\n]+$") as caught:
        open_store(url, replica=1, ended_memory_seconds=1)
    assert "pass" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("url", "loads"), [("sqlite:///cells.db", False), ("redis://localhost", True)])
def test_the_client_of_redis_is_loaded_only_where_the_url_asks_for_it(url: str, loads: bool) -> None:
    code = "import sys; from cellserve_service.stores import open_store; assert 'redis' not in sys.modules; "
    code += f"open_store({url!r}, replica=1, ended_memory_seconds=1); sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == loads
