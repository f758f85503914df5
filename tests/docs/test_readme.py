"""The README says what is so: its tables are those of the code, its examples run."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellserve import Client
from tests.support.readme import README, with_tables
from tests.support.server import ServerProcess

BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_tables_of_the_readme_are_those_of_the_code() -> None:
    assert README.read_text() == with_tables(README.read_text()), "run: python -m tests.support.readme"


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_an_example_of_the_readme_runs(
    block: str, server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block.replace("localhost:50051", server.target)
    code = code.replace("localhost:50052", f"localhost:{server.port}")  # the same server by another name
    if "async with" not in code:
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own README
        return
    indented = "".join(f"    {line}\n" for line in code.splitlines())
    scope: dict[str, object] = {}
    exec(compile(f"async def example():\n{indented}", "README.md", "exec"), scope)  # noqa: S102 - our own README
    asyncio.run(scope["example"]())  # type: ignore[operator]


@pytest.fixture(autouse=True)
def _no_sessions_left(server: ServerProcess) -> Iterator[None]:
    """Sessions with an id stay open when they are left; other tests that share the server want none."""
    yield
    with Client(server.target) as client:
        for left in client.sessions():
            client.open_session(left.model, id=left.id, mode="attach").close()
