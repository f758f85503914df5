"""The blocking client with timeouts that pass at any moment of a call: it has taken effect wholly or not at all."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from cellserve import Client, Session
from cellserve.errors import ConnectionLost, TimedOut
from tests.support.replicas import MODEL
from tests.support.server import ServerProcess

TIMEOUTS = np.geomspace(2e-4, 2e-2, 16).tolist()


@pytest.fixture
def client(storing_server: ServerProcess) -> Iterator[Client]:
    with Client(storing_server.target) as client:
        yield client
        assert client.sessions() == []


def states(session: Session) -> list[float]:
    result = session.step([5, 0], states=True)
    assert result.states is not None
    values: list[float] = result.states.ravel().tolist()
    return values


CALLS: dict[str, tuple[Callable[[Session, float], object], Callable[[int], set[int]]]] = {
    "step": (lambda session, seconds: session.step([9, 9], timeout_seconds=seconds), lambda position: {position + 2}),
    "reset": (lambda session, seconds: session.reset(timeout_seconds=seconds), lambda position: {0}),
    "rollback": (lambda session, seconds: session.rollback("marked", timeout_seconds=seconds), lambda position: {2}),
    "export": (lambda session, seconds: session.export_state(timeout_seconds=seconds), lambda position: {position}),
}


@pytest.mark.parametrize("durability", ["none", "periodic"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_whose_timeout_passes_has_taken_effect_wholly_or_not_at_all(
    client: Client, durability: str, name: str
) -> None:
    call, positions = CALLS[name]
    outcomes: set[bool] = set()
    with (
        client.session(MODEL, durability=durability) as session,  # type: ignore[arg-type]
        client.session(MODEL, durability="none") as reference,
    ):
        for one in (session, reference):
            one.step([1, 2])
            one.checkpoint("marked")
            one.step([3, 4])
        for seconds in TIMEOUTS:
            before, is_late = reference.position, True
            with suppress(TimedOut, ConnectionLost):
                call(session, seconds)
                is_late = False
            outcomes.add(is_late)
            found = states(session)
            stood = session.position - 2
            assert stood in positions(before) | ({before} if is_late else set())
            if stood in positions(before):
                call(reference, 30.0)
            assert found == states(reference)
            assert session.position == reference.position
    assert outcomes == {False, True}
