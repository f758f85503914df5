"""Isolation under disorder: sessions run, are cancelled, moved, cut, reset, forked, closed, and follow the oracle."""

from collections.abc import Callable

import numpy as np
import pytest

from cellserve.v1 import session_service_pb2 as pb
from tests.support.server import ServerProcess
from tests.support.stream import Answer, outputs
from tests.support.wire import Follower, Wire

MODELS = ("tiny-gru", "tiny-lstm", "tiny-leaky_rnn")


@pytest.fixture
def server(small_server: ServerProcess) -> ServerProcess:
    return small_server


class Disorder:
    """Seven sessions of three models on three streams and three slots, and everything that may happen to them."""

    def __init__(self, wire: Wire, seed: int) -> None:
        self.wire = wire
        self.random = np.random.default_rng(seed)
        self.streams = [wire.stream() for _ in range(3)]
        self.sessions = [self._new() for _ in range(7)]

    def act(self) -> None:
        """One thing happens to one session, while others run."""
        actions: list[Callable[[int], None]] = [
            self.run, self.run, self.run, self.cancel, self.move, self.cut, self.reset, self.close, self.fork,
            self.carry, self.step_beside,
        ]  # fmt: skip
        place = int(self.random.integers(len(self.sessions)))
        others = [session for other, session in enumerate(self.sessions) if other != place]
        chosen = [session for session in others if self.random.random() < 0.5]
        runs = [self._tokens() for _ in chosen]
        requests = [self._send(session, run) for session, run in zip(chosen, runs, strict=True)]
        before = [session.stream for session in chosen]
        actions[int(self.random.integers(len(actions)))](place)
        for session, run, request, stream in zip(chosen, runs, requests, before, strict=True):
            if session.stream is stream:
                session.take(run, request)
            else:
                # Its stream was cut: a repeat tells whether it had run, and runs it if not.
                session.take(run, self._send(session, run))

    def run(self, place: int) -> None:
        self.sessions[place].step(self._tokens())

    def cancel(self, place: int) -> None:
        session, runs = self.sessions[place], [self._tokens() for _ in range(3)]
        starts = np.cumsum([session.position, *map(len, runs)])
        wanted = outputs(states=True)
        requests = session.stream.run([session.handle] * 3, runs, wanted, positions=starts[:3])
        session.stream.cancel(requests[1])
        for run, request in zip(runs, requests, strict=True):
            outcome = session.stream.outcome(request)
            if isinstance(outcome, Answer):
                session.check_answer(run, outcome)

    def move(self, place: int) -> None:
        session = self.sessions[place]
        target = self.streams[int(self.random.integers(len(self.streams)))]
        session.attach(target.open(session.model, session.id, "ATTACH"))
        session.stream = target

    def cut(self, place: int) -> None:
        """The stream of a session is lost with everything under way on it."""
        lost = self.sessions[place].stream
        lost.cut()
        fresh = self.streams[self.streams.index(lost)] = self.wire.stream()
        for session in self.sessions:
            if session.stream is lost:
                session.attach(fresh.open(session.model, session.id, "ATTACH"))
                session.stream = fresh

    def reset(self, place: int) -> None:
        session = self.sessions[place]
        session.restart(session.stream.done(session.stream.reset(session.handle)).handle)

    def close(self, place: int) -> None:
        session = self.sessions[place]
        session.stream.done(session.stream.close_session(session.handle))
        self.sessions[place] = self._new()

    def fork(self, place: int) -> None:
        """A copy takes the session's place."""
        session = self.sessions[place]
        forked = self.wire.sessions.ForkSession(pb.ForkSessionRequest(session_id=session.id))
        copy = Follower(self.wire, session.stream, session.model, session_id=forked.session_id, mode="ATTACH")
        copy.consumed(session.tokens)
        copy.step(self._tokens())
        session.check()
        session.stream.done(session.stream.close_session(session.handle))
        self.sessions[place] = copy

    def carry(self, place: int) -> None:
        """The session's state is exported, and begins another session."""
        session = self.sessions[place]
        state = self.wire.state(session.id).SerializeToString()
        copy = Follower(self.wire, session.stream, session.model, states=[state], mode="CREATE")
        copy.consumed(session.tokens)
        session.stream.done(session.stream.close_session(session.handle))
        self.sessions[place] = copy

    def step_beside(self, place: int) -> None:
        """Somebody steps the session by a unary call."""
        session, tokens = self.sessions[place], self._tokens()
        assert self.wire.step(session.id, tokens).position == session.position + len(tokens)
        session.consumed(tokens)

    def _new(self) -> Follower:
        stream = self.streams[int(self.random.integers(len(self.streams)))]
        return Follower(self.wire, stream, str(self.random.choice(MODELS)))

    def _tokens(self) -> list[int]:
        number = int(self.random.choice([1, 1, 2, 5, 30]))
        return [int(token) for token in self.random.integers(0, 11, number)]

    def _send(self, session: Follower, run: list[int]) -> int:
        wanted = outputs(states=True)
        return session.stream.run([session.handle], [run], wanted, positions=[session.position])[0]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_every_session_follows_the_oracle(wire: Wire, seed: int) -> None:
    disorder = Disorder(wire, seed)
    for _ in range(60):
        disorder.act()
    for session in disorder.sessions:
        session.check()
