"""Calls with a request id: a repeat changes nothing and gets the first answer, wherever it comes from."""

import numpy as np
import pytest

from cellserve_service.errors import invalid, reason_name
from cellserve_service.idempotency import RequestMemory
from cellserve_service.messages import (
    CloseSessions,
    Command,
    Done,
    Event,
    Failures,
    Opened,
    ResetSessions,
    SessionForked,
    SessionTarget,
)

Asker = tuple[int, int]


class _Calls:
    """An engine of resets that count themselves, behind the memory. Stream and request number of each call differ."""

    def __init__(self, *, max_answers: int = 100) -> None:
        self.now = 0.0
        self.memory = RequestMemory(60.0, max_answers=max_answers)
        self.number = 0
        self.unanswered: list[tuple[Asker, int]] = []
        self._last_asker = 0

    def ask(self, request_id: str, digest: bytes = b"reset a", stream: int = 1, kind: type = ResetSessions) -> Asker:
        """Send a call."""
        self._last_asker += 1
        asker = (stream, self._last_asker)
        requests = np.array([asker[1]], np.uint64)
        target = SessionTarget(stream, requests, session_ids=["a"], request_id=request_id, request_digest=digest)
        command: Command = kind(target)
        if not self.memory.knows(command, self.now):
            self.number += 1
            self.unanswered.append((asker, self.number))
        return asker

    def finish(self) -> dict[Asker, int | str]:
        """What is answered when the engine has done all that it was asked: epochs, or reasons."""
        events: list[Event] = [_done(asker, epoch) for asker, epoch in self.unanswered]
        self.unanswered = []
        return _told(self.memory.see(events))

    def refuse(self) -> dict[Asker, int | str]:
        """What is answered when the engine refuses it all."""
        refusal = invalid("not now")
        events: list[Event] = [
            Failures(stream, np.array([request], np.uint64), (refusal,)) for (stream, request), _ in self.unanswered
        ]
        self.unanswered = []
        return _told(self.memory.see(events))

    def reset(self, request_id: str, digest: bytes = b"reset a", stream: int = 1) -> int | str:
        """Send a call and see how it is answered: once, and nobody else is."""
        asker = self.ask(request_id, digest, stream)
        told = self.finish()
        assert told.keys() == {asker}
        return told[asker]


def _done(asker: Asker, epoch: int) -> Done:
    return Done(asker[0], np.array([asker[1]], np.uint64), np.zeros(1, np.uint64), np.array([epoch]), np.zeros(1, int))


def _told(events: list[Event]) -> dict[Asker, int | str]:
    told: dict[Asker, int | str] = {}
    for event in events:
        assert isinstance(event, Done | Failures)
        asker = (event.stream, int(event.requests[0]))
        assert asker not in told
        told[asker] = int(event.epochs[0]) if isinstance(event, Done) else reason_name(event.refusals[0].reason)
    return told


def test_a_repeat_gets_the_first_answer_and_other_ids_their_own() -> None:
    calls = _Calls()
    assert [calls.reset(request_id) for request_id in ("x", "y", "x", "y", "x")] == [1, 2, 1, 2, 1]


def test_a_repeat_on_another_stream_gets_the_first_answer() -> None:
    calls = _Calls()
    assert [calls.reset("x", stream=stream) for stream in (1, 1 << 40, 2 << 40)] == [1, 1, 1]


def test_calls_without_an_id_are_all_made() -> None:
    calls = _Calls()
    assert [calls.reset("") for _ in range(3)] == [1, 2, 3]


def test_an_id_used_for_another_call_is_refused() -> None:
    calls = _Calls()
    calls.reset("x")
    assert calls.reset("x", digest=b"reset b") == "INVALID_INPUT"
    closing = calls.ask("x", digest=b"close a", kind=CloseSessions)
    assert calls.finish() == {closing: "INVALID_INPUT"}
    assert calls.number == 1
    assert calls.reset("x") == 1


def test_an_id_that_is_too_long_is_refused() -> None:
    calls = _Calls()
    assert calls.reset("x" * 128) == 1
    assert calls.reset("x" * 129) == "INVALID_INPUT"
    assert calls.number == 1


def test_a_refused_call_is_not_remembered() -> None:
    calls = _Calls()
    asker = calls.ask("x")
    assert calls.refuse() == {asker: "INVALID_INPUT"}
    assert calls.reset("x") == 2


def test_repeats_of_a_call_that_still_goes_on_wait_for_it() -> None:
    calls = _Calls()
    askers = [calls.ask("x", stream=stream) for stream in (1, 2, 3)]
    assert calls.finish() == dict.fromkeys(askers, 1)
    assert calls.finish() == {}


def test_repeats_of_a_call_that_is_refused_are_refused() -> None:
    calls = _Calls()
    askers = [calls.ask("x") for _ in range(3)]
    assert calls.refuse() == dict.fromkeys(askers, "INVALID_INPUT")
    assert calls.reset("x") == 2


def test_every_kind_of_answer_is_given_again_under_the_number_of_the_repeat() -> None:
    numbers = np.array([7, 7, 7], np.uint64)
    opened = Opened(
        stream=1,
        requests=numbers,
        session_ids=["a", "b", "c"],
        handles=numbers,
        positions=np.arange(3),
        epochs=np.arange(3),
        created=np.ones(3, np.bool_),
        durable_positions=None,
        durabilities=np.zeros(3, np.uint8),
    )
    forked = SessionForked(1, 7, "copy", 5, 2)
    for answer in (opened, forked):
        memory = RequestMemory(60.0)
        first, repeat = (
            ResetSessions(SessionTarget(stream, np.array([request], np.uint64), request_id="x"))
            for stream, request in ((1, 7), (2, 9))
        )
        assert not memory.knows(first, 0.0)
        assert memory.see([answer]) == [answer]
        assert memory.knows(repeat, 0.0)
        [again] = memory.see([])
        assert type(again) is type(answer)
        assert again.stream == 2
        if isinstance(again, Opened):
            assert again.requests.tolist() == [9, 9, 9]
            assert again.session_ids == ["a", "b", "c"]
        else:
            assert again == SessionForked(2, 9, "copy", 5, 2)


def test_answers_are_forgotten_after_their_time() -> None:
    calls = _Calls()
    calls.reset("x")
    calls.now = 59.0
    assert calls.reset("x") == 1
    calls.now = 61.0
    assert calls.reset("x") == 2


def test_only_so_many_answers_are_remembered() -> None:
    calls = _Calls(max_answers=2)
    assert [calls.reset(request_id) for request_id in ("x", "y", "x", "z", "y", "x")] == [1, 2, 1, 3, 2, 4]


@pytest.mark.parametrize("refused", [False, True])
def test_a_call_whose_memory_had_to_go_is_answered_with_those_that_wait_for_it(refused: bool) -> None:
    calls = _Calls(max_answers=1)
    askers = [calls.ask("x"), calls.ask("x"), calls.ask("y"), calls.ask("x")]
    told = calls.refuse() if refused else calls.finish()
    assert [told[asker] for asker in askers] == (["INVALID_INPUT"] * 4 if refused else [1, 1, 2, 3])
    # The last call under the id is the one that is remembered.
    assert calls.reset("x") == (4 if refused else 3)
