"""Opening, leaving, sharing and losing sessions through the client."""

from collections.abc import AsyncIterator

import numpy as np
import pytest

from cellserve import AsyncClient, AsyncSession, Client
from cellserve.errors import (
    ClosedError,
    InvalidInput,
    ModelNotFound,
    NoStore,
    SessionClosed,
    SessionExists,
    SessionExpired,
    SessionLost,
    SessionMoved,
    SessionNotFound,
    StaleHandle,
    StateMismatch,
)
from cellserve.v1.session_service_pb2 import CloseSessionRequest, ResetSessionRequest
from tests.support.server import ServerProcess
from tests.support.wire import Wire

TOKENS = [3, 1, 4, 1, 5]


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


@pytest.fixture
async def other_client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as client:
        yield client


async def open_ids(client: AsyncClient) -> set[str]:
    return {session.id for session in await client.sessions()}


async def states(session: AsyncSession, tokens: list[int]) -> list[float]:
    result = await session.step(tokens, states=True)
    assert result.states is not None
    values: list[float] = result.states.ravel().tolist()
    return values


async def test_the_server_tells_its_models(client: AsyncClient) -> None:
    models = {model.name: model for model in await client.models()}
    assert list(models) == sorted(models)
    lstm = models["tiny-lstm"]
    assert (lstm.cell, lstm.num_layers, lstm.hidden_size, lstm.state_size) == ("lstm", 2, 8, 16)
    assert (lstm.vocab_size, lstm.input_size, lstm.output_size, lstm.version) == (11, None, 11, 1)
    assert len(lstm.gate_names) == 3
    assert len(lstm.fingerprint) == 32
    assert models["vectors-gru"].vocab_size is None
    assert models["headless"].output_size is None


async def test_ping_takes_its_time_and_says_how_much(client: AsyncClient) -> None:
    assert 0 < await client.ping() < 5


async def test_leaving_closes_a_session_without_an_id(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        assert session.created
        assert session.id in await open_ids(client)
        assert session.durable_position is None
    assert session.id not in await open_ids(client)
    with pytest.raises(ClosedError, match=session.id):
        await session.step(1)


async def test_leaving_detaches_from_a_session_with_an_id_which_goes_on_where_it_stood(client: AsyncClient) -> None:
    async with client.session("tiny-gru", id="kept") as session:
        await session.step(TOKENS)
    with pytest.raises(ClosedError, match="detached"):
        await session.step(1)
    async with client.session("tiny-gru", id="kept", keep=False) as again:
        assert (again.created, again.position) == (False, 5)
        assert again.epoch > session.epoch
        assert (await again.step(1)).position == 6
    assert "kept" not in await open_ids(client)


async def test_keep_overrides_what_leaving_does(client: AsyncClient) -> None:
    async with client.session("tiny-gru", keep=True) as session:
        pass
    assert session.id in await open_ids(client)
    async with client.session("tiny-gru", id=session.id, mode="attach", keep=False):
        pass
    assert session.id not in await open_ids(client)


async def test_what_was_opened_without_a_with_closes_with_the_client_unless_it_is_kept(
    server: ServerProcess, client: AsyncClient
) -> None:
    async with AsyncClient(server.target) as passing:
        plain = await passing.open_session("tiny-gru")
        named = await passing.open_session("tiny-gru", id="named")
        fork = await plain.fork()
        closed = await passing.open_session("tiny-gru")
        await closed.close()
        await closed.close()
        assert {plain.id, named.id, fork.id} <= await open_ids(client)
        assert closed.id not in await open_ids(client)
    left = await open_ids(client)
    assert "named" in left
    assert not {plain.id, fork.id} & left
    await (await client.open_session("tiny-gru", id="named", mode="attach")).close()


async def test_modes_say_what_may_happen(client: AsyncClient) -> None:
    with pytest.raises(SessionNotFound) as missing:
        await client.open_session("tiny-gru", id="never-was", mode="attach")
    assert missing.value.session_id == "never-was"
    async with client.session("tiny-gru", id="there", mode="create", keep=False):
        with pytest.raises(SessionExists) as exists:
            await client.open_session("tiny-gru", id="there", mode="create")
        assert (exists.value.session_id, exists.value.code) == ("there", "ALREADY_EXISTS")
        with pytest.raises(SessionExists):
            await client.open_session("tiny-lstm", id="there")
    with pytest.raises(SessionClosed):
        await client.open_session("tiny-gru", id="there", mode="attach")
    with pytest.raises(ValueError, match="mode"):
        await client.open_session("tiny-gru", mode="somehow")  # type: ignore[arg-type]


async def test_what_cannot_be_opened_says_why(client: AsyncClient) -> None:
    with pytest.raises(ModelNotFound):
        await client.open_session("no-such-model")
    with pytest.raises(NoStore):
        await client.open_session("tiny-gru", durability="sync")
    with pytest.raises(InvalidInput):
        await client.open_session("tiny-gru", id="spaces are not for ids")


async def test_a_fork_is_independent_and_begins_where_its_origin_stood(client: AsyncClient) -> None:
    async with client.session("tiny-lstm") as session:
        await session.step(TOKENS)
        async with await session.fork() as fork, await session.fork("named-fork") as named:
            assert named.id == "named-fork"
            assert (fork.position, named.position, fork.created) == (5, 5, True)
            assert await states(fork, [1, 2]) == await states(named, [1, 2])
            assert await states(fork, [7]) != await states(named, [8])
            assert session.position == 5
            with pytest.raises(SessionExists):
                await session.fork("named-fork")
        assert not {fork.id, named.id} & await open_ids(client)


async def test_an_exported_state_begins_another_session_or_replaces_the_state_of_one(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        await session.step(TOKENS)
        state = await session.export_state()
        expected = await states(session, [6, 7])
        async with client.session("tiny-gru", state=state) as copy:
            assert (copy.position, copy.created) == (5, True)
            assert await states(copy, [6, 7]) == expected
            await copy.import_state(state)
            epoch = copy.epoch
            assert copy.position == 5
            assert await states(copy, [6, 7]) == expected
            assert copy.epoch >= epoch
        await session.import_state(state)
        assert await states(session, [6, 7]) == expected


async def test_a_foreign_or_damaged_state_is_refused_and_moves_nothing(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session, client.session("tiny-lstm") as foreign:
        await session.step(TOKENS)
        state = await foreign.export_state()
        for wrong in (state, b"garbage", b""):
            with pytest.raises(StateMismatch):
                await session.import_state(wrong)
        own = bytearray(await session.export_state())
        own[-8] ^= 1
        with pytest.raises(StateMismatch):
            await session.import_state(bytes(own))
        with pytest.raises(StateMismatch):
            await client.open_session("tiny-gru", state=state)
        assert (await session.step(1)).position == 6


async def test_a_reset_session_is_as_new(client: AsyncClient) -> None:
    async with client.session("tiny-gru") as session:
        first = await states(session, TOKENS)
        epoch = session.epoch
        await session.reset()
        assert session.position == 0
        assert session.epoch > epoch
        assert await states(session, TOKENS) == first
        assert session.position == 5


async def test_many_sessions_open_at_once_in_their_order(client: AsyncClient) -> None:
    created = await client.open_sessions("tiny-gru", 300)
    assert len({session.id for session in created}) == 300
    names = [f"many-{number}" for number in range(50)]
    named = await client.open_sessions("tiny-gru", names, keep=False)
    assert [session.id for session in named] == names
    assert set(names) | {session.id for session in created} <= await open_ids(client)
    assert {session.model for session in await client.sessions("tiny-gru")} == {"tiny-gru"}


async def test_many_sessions_open_all_or_none(client: AsyncClient) -> None:
    async with client.session("tiny-lstm", id="in-the-way", keep=False):
        before = await open_ids(client)
        with pytest.raises(SessionExists) as exists:
            await client.open_sessions("tiny-gru", ["free-1", "in-the-way", "free-2"])
        assert exists.value.session_id == "in-the-way"
        assert await open_ids(client) == before


async def test_many_sessions_begin_with_a_state_each(client: AsyncClient) -> None:
    origins = await client.open_sessions("tiny-gru", 3)
    for number, session in enumerate(origins):
        await session.step(TOKENS[: number + 1])
    exported = [await session.export_state() for session in origins]
    copies = await client.open_sessions("tiny-gru", 3, states=exported)
    assert [session.position for session in copies] == [1, 2, 3]
    with pytest.raises(ValueError, match="states"):
        await client.open_sessions("tiny-gru", 2, states=exported)
    with pytest.raises(TypeError, match="open_session"):
        await client.open_sessions("tiny-gru", "one-id")
    with pytest.raises(ValueError, match="all different"):
        await client.open_sessions("tiny-gru", ["twice", "twice"])
    with pytest.raises(ValueError, match="at least one character"):
        await client.open_session("tiny-gru", id="")
    assert await client.open_sessions("tiny-gru", 0) == []


async def test_a_session_taken_over_is_moved_and_is_not_taken_back(
    client: AsyncClient, other_client: AsyncClient
) -> None:
    session = await client.open_session("tiny-gru", id="contested")
    await session.step(TOKENS)
    async with other_client.session("tiny-gru", id="contested", keep=False) as winner:
        assert (winner.position, winner.created) == (5, False)
        for _ in range(2):
            with pytest.raises(SessionMoved) as moved:
                await session.step(1)
            assert isinstance(moved.value, SessionLost)
            assert moved.value.session_id == "contested"
        assert (await winner.step(1)).position == 6
        await session.close()  # not ours to close any more
        assert (await winner.step(1)).position == 7


async def test_a_session_closed_by_somebody_else_says_so(client: AsyncClient, wire: Wire) -> None:
    async with client.session("tiny-gru", id="closed-elsewhere") as session:
        wire.sessions.CloseSession(CloseSessionRequest(session_id=session.id))
        with pytest.raises(SessionClosed):
            await session.step(1)
        with pytest.raises(SessionClosed):
            await session.export_state()


async def test_a_session_reset_by_somebody_else_is_stale_until_it_is_opened_again(
    client: AsyncClient, wire: Wire
) -> None:
    async with client.session("tiny-gru", id="reset-elsewhere") as session:
        await session.step(TOKENS)
        wire.sessions.ResetSession(ResetSessionRequest(session_id=session.id))
        with pytest.raises(StaleHandle):
            await session.step(1)
    async with client.session("tiny-gru", id="reset-elsewhere", keep=False) as again:
        assert again.position == 0


async def test_an_idle_session_expires_and_says_so(expiring_server: ServerProcess) -> None:
    async with AsyncClient(expiring_server.target) as client:
        session = await client.open_session("tiny-gru", id="idle")
        while "idle" in await open_ids(client):
            await client.ping()
        with pytest.raises(SessionExpired) as expired:
            await session.step(1)
        assert expired.value.session_id == "idle"


async def test_two_clients_of_one_process_do_not_disturb_each_other(
    client: AsyncClient, other_client: AsyncClient
) -> None:
    async with client.session("tiny-gru") as one, other_client.session("tiny-gru") as two:
        await other_client.close()
        assert (await one.step(TOKENS)).position == 5
        with pytest.raises(ClosedError):
            await two.step(1)


def test_the_blocking_client_does_the_same(server: ServerProcess) -> None:
    with Client(server.target, timeout_seconds=20, metadata={"x-tenant": "tests"}) as client:
        assert client.ping() > 0
        with client.session("tiny-gru", id="blocking") as session:
            assert (session.id, session.created, session.model.name) == ("blocking", True, "tiny-gru")
            assert session.step(TOKENS).position == session.position == 5
            state = session.export_state()
            fork = session.fork()
            session.reset()
            session.import_state(state)
            assert (session.position, fork.position) == (5, 5)
            assert session.epoch > 1
            assert session.durable_position is None
            many = client.open_sessions("tiny-gru", 3)
            result = client.step_many([session, fork, *many], np.arange(5))
            assert result.positions.tolist() == [6, 6, 1, 1, 1]
            fork.close()
            with pytest.raises(ClosedError):
                fork.step(1)
        with client.session("tiny-gru", id="blocking", keep=False) as again:
            assert again.position == 6
        assert {"blocking", fork.id}.isdisjoint(session.id for session in client.sessions())
    with pytest.raises(ClosedError):
        client.models()
    with pytest.raises(ClosedError):
        session.step(1)
