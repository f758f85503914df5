"""Stores that are not what they should be: damaged rows, damaged files, other versions, nobody at the address."""

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from cellserve.v1 import session_service_pb2 as pb
from tests.support.redis_server import RedisServer
from tests.support.refusals import expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.server import free_port


def flip_a_byte(url: str, session_id: str, column: str) -> None:
    """One bit in what a store has of a session."""

    def flipped(blob: bytes) -> bytes:
        place = len(blob) // 2
        return blob[:place] + bytes([blob[place] ^ 0x10]) + blob[place + 1 :]

    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
            connection.create_function("flipped", 1, flipped)
            statement = f"UPDATE sessions SET {column} = flipped({column}) WHERE session_id = ?"  # noqa: S608 - our own
            changed = connection.execute(statement, (session_id,))
            assert changed.rowcount == 1
    else:
        with Redis.from_url(url) as client:
            key = f"cellserve:session:{session_id}"
            blob = client.hget(key, column)
            assert isinstance(blob, bytes)
            client.hset(key, column, flipped(blob))


def stored(replica: Replica, *session_ids: str) -> None:
    """Sessions that have consumed three tokens, have a mark, and are in the store alone."""
    for session_id in session_ids:
        session = replica.session(session_id)
        session.step([1, 2, 3])
        replica.checkpoint(session_id, "here")
        replica.stream.done(replica.stream.detach(session.handle))


def refuse_damaged(replica: Replica, session_id: str, *, reads: bool) -> None:
    """It is served to nobody. reads: what only looks at it cannot do so, either."""
    command, [request] = replica.stream.opening(MODEL, [session_id], "ATTACH")
    replica.stream.send(command)
    expect(replica.stream.refusal(request), "STATE_DAMAGED")
    calls: list[Callable[[], object]] = [
        partial(replica.wire.open, MODEL, [session_id]),
        partial(replica.wire.step, session_id, [1]),
        partial(replica.reset, session_id),
        partial(replica.rollback, session_id, "here"),
        partial(replica.import_state, session_id, replica.quiet_state([1])),
        lambda: replica.wire.sessions.Generate(pb.GenerateRequest(session_id=session_id, max_tokens=1)),
    ]
    if reads:
        calls += [partial(call, session_id) for call in (replica.get, replica.wire.state, replica.fork)]
    for call in calls:
        expect(of_call(call), "STATE_DAMAGED")


@pytest.mark.parametrize("column", ["blob", "checkpoints"])
def test_a_damaged_row_is_refused_by_name_and_can_be_closed(replica: Replica, store_url: str, column: str) -> None:
    stored(replica, "damaged", "whole")
    flip_a_byte(store_url, "damaged", column)
    for _ in ("here", "after a crash"):
        refuse_damaged(replica, "damaged", reads=column == "blob")
        # What was refused has not even touched it, nor anybody else.
        assert replica.wire.step("whole", [4]).position == 4
        replica.rollback("whole", "here")
        listed = replica.wire.sessions.ListSessions(pb.ListSessionsRequest()).sessions
        assert [one.id for one in listed] == ["damaged", "whole"]
        replica.crash()
    assert replica.close("damaged").position == 3
    expect(of_call(partial(replica.get, "damaged")), "SESSION_CLOSED", field="session_id")
    assert replica.stream.open(MODEL, "damaged", "CREATE").created
    assert replica.wire.state("whole") == replica.quiet_state([1, 2, 3])


def test_a_session_that_was_damaged_while_it_was_parked_is_lost_by_name(
    start_replica: StartReplica, store_url: str
) -> None:
    replica = start_replica(max_slots=1, max_parked_states=0)
    sessions = [replica.session(name) for name in ("damaged", "whole")]
    for session in sessions:
        session.step([1, 2])
    while replica.get("damaged").tier != pb.Tier.TIER_STORE:
        pass
    flip_a_byte(store_url, "damaged", "blob")
    expect(replica.stream.refuse(sessions[0].handle, [3]), "STATE_DAMAGED")
    loss = replica.stream.loss()
    assert (loss.handle, loss.reason) == (sessions[0].handle, "STATE_DAMAGED")
    sessions[1].step([3])
    refuse_damaged(replica, "damaged", reads=True)
    replica.close("damaged")
    replica.check_exactly(sessions[1])


def test_a_session_of_another_model_under_the_same_name_is_not_served(
    start_replica: StartReplica, store_url: str, tmp_path: Path
) -> None:
    replica = start_replica()
    stored(replica, "s", "t")
    replica.kill()
    models = tmp_path / "other-models"
    models.mkdir()
    assert replica.server.models is not None
    (models / MODEL).symlink_to(replica.server.models / "tiny-lstm")
    other = start_replica(models=str(models))
    command, [request] = other.stream.opening(MODEL, ["s"], "ATTACH")
    other.stream.send(command)
    expect(other.stream.refusal(request), "STATE_MISMATCH")
    expect(of_call(partial(other.wire.state, "s")), "STATE_MISMATCH")
    other.close("s")
    other.kill()
    replica.start()
    expect(of_call(partial(replica.get, "s")), "SESSION_CLOSED", field="session_id")
    assert replica.wire.state("t") == replica.quiet_state([1, 2, 3])


def refuse_start(start_replica: StartReplica, url: str) -> str:
    """The command ends with status 2 and says why in one line."""
    with pytest.raises(AssertionError, match=re.compile("ended with 2:\n(.*)", re.DOTALL)) as caught:
        start_replica(store=url)
    said = str(caught.value).partition(":\n")[2].splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("cellserve-server: cannot use the state store: ")
    assert len(said[0]) < 300
    return said[0]


def test_a_server_starts_on_no_database_that_is_not_its_own(start_replica: StartReplica, tmp_path: Path) -> None:
    path = tmp_path / "cells.db"
    replica = start_replica(store=f"sqlite:///{path}")
    stored(replica, "s")
    replica.stop()
    content = path.read_bytes()
    path.write_bytes(b"no database at all, whatever its name may be. " * 100)
    assert "is not a database" in refuse_start(start_replica, f"sqlite:///{path}")
    path.write_bytes(content)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    assert "99" in refuse_start(start_replica, f"sqlite:///{path}")
    assert "folder" in refuse_start(start_replica, f"sqlite:///{tmp_path}/nowhere/cells.db")
    path.write_bytes(content)
    replica.start()
    assert replica.wire.state("s") == replica.quiet_state([1, 2, 3])


def test_a_server_starts_on_no_redis_that_is_not_there_or_not_its_own(
    start_replica: StartReplica, redis_url: str
) -> None:
    assert "cannot be reached" in refuse_start(start_replica, f"redis://127.0.0.1:{free_port()}/0")
    with Redis.from_url(redis_url) as client:
        client.set("cellserve:version", "99")
    assert "99" in refuse_start(start_replica, redis_url)


def test_a_file_that_was_moved_away_is_made_anew(start_replica: StartReplica, tmp_path: Path) -> None:
    path = tmp_path / "cells.db"
    replica = start_replica(store=f"sqlite:///{path}")
    session = replica.session("s")
    session.step([1, 2, 3])
    stored(replica, "lost")
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink()
    expect(of_call(partial(replica.get, "lost")), "SESSION_NOT_FOUND", field="session_id")
    session.step([4])
    replica.crash()
    replica.attach(session)
    replica.check_exactly(session)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        (("--appendonly", "no"), "appendonly no"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "appendfsync everysec"),
        (("--appendonly", "yes", "--appendfsync", "always"), None),
    ],
)
def test_a_redis_that_may_lose_sessions_is_warned_of(
    start_replica: StartReplica, tmp_path: Path, settings: tuple[str, ...], warning: str | None
) -> None:
    with RedisServer(tmp_path, settings) as server:
        replica = start_replica(store=server.url)
        warnings = [line for line in replica.server.log.splitlines() if "warning" in line]
        assert len(warnings) == (warning is not None)
        assert warning is None or warning in warnings[0]
