"""Servers that are killed: what `sync` answered is there afterwards, `periodic` lost an interval, `none` is gone."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from cellserve.v1.session_service_pb2 import GenerateRequest
from tests.support.generating import Generated, generate, request_of
from tests.support.refusals import expect, of_call
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import Opened, RawStream, outputs
from tests.support.wire import Follower

pytestmark = pytest.mark.usefixtures("store_url")

INTERVAL_SECONDS = 0.1
# Beyond the interval, what a checkpoint may take on a machine that does other things as well.
CHECKPOINT_SECONDS = 1.0


def token_at(session: int, position: int) -> int:
    """What a client without a memory sends at a position."""
    return (7 * session + 3 * position + position * position // 5) % 11


@dataclass
class Sender:
    """Keeps a session busy, and remembers of it no more than when which position was answered, and told as durable."""

    number: int
    id: str
    opened: Opened
    asked: list[tuple[int, int]] = field(default_factory=list)  # request, position after it
    sent: int = 0
    answered: list[tuple[float, int]] = field(default_factory=list)
    durable: int = 0

    def run(self, stream: RawStream, random: np.random.Generator) -> None:
        """Send a few runs behind each other."""
        first = self.sent = max(self.sent, self.opened.position)
        ends = first + random.integers(1, 9, 3).cumsum()
        runs = [
            [token_at(self.number, position) for position in range(begin, end)]
            for begin, end in zip([first, *ends[:-1].tolist()], ends.tolist(), strict=True)
        ]
        positions = [first, *ends[:-1].tolist()]
        requests = stream.run([self.opened.handle] * 3, runs, outputs("last", next_token=True), positions=positions)
        self.asked = list(zip(requests, ends.tolist(), strict=True))
        self.sent = int(ends[-1])

    def hear(self, stream: RawStream) -> None:
        """Wait for the answers."""
        for request, position in self.asked:
            assert stream.answer(request).position == position
            self.answered.append((time.monotonic(), position))
            self.durable = stream.account.durable_positions[self.opened.handle]


def run_until_killed(replica: Replica, senders: list[Sender], after_seconds: float, seed: int) -> float:
    """Stream runs until the server is killed at some moment; returns when that was."""
    random = np.random.default_rng(seed)
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        replica.server.kill()

    timer = threading.Timer(after_seconds, kill)
    timer.start()
    try:
        while True:
            for sender in senders:
                sender.run(replica.stream, random)
            for sender in senders:
                sender.hear(replica.stream)
    except (EOFError, grpc.RpcError):
        timer.join()
    for sender in senders:
        sender.durable = max(sender.durable, replica.stream.account.durable_positions[sender.opened.handle])
    replica.wire.disconnect()
    return killed_at[0]


def test_what_was_answered_or_told_durable_is_there_after_every_crash(start_replica: StartReplica) -> None:
    replica = start_replica(checkpoint_interval_seconds=INTERVAL_SECONDS)
    durabilities = ["SYNC", "PERIODIC"] * 4
    senders = []
    for number, durability in enumerate(durabilities):
        session_id = f"{durability}-{number}"
        opened = replica.stream.open(MODEL, session_id, "CREATE", durability=durability)
        assert (opened.durability, opened.durable_position) == (durability, 0)
        senders.append(Sender(number, session_id, opened))
    for crash, after_seconds in enumerate([0.2, 0.4, 0.05, 1.5]):
        killed_at = run_until_killed(replica, senders, after_seconds, seed=crash)
        replica.start()
        for sender in senders:
            sender.opened = replica.stream.open(MODEL, sender.id, "ATTACH")
            position = sender.opened.position
            assert sender.opened.durable_position == position
            assert sender.durable <= position <= sender.sent
            if sender.opened.durability == "SYNC":
                assert position >= sender.answered[-1][1]
            else:
                latest = killed_at - INTERVAL_SECONDS - CHECKPOINT_SECONDS
                assert position >= max((at for when, at in sender.answered if when < latest), default=0)
            sender.sent = sender.durable = position
            sender.answered = [(killed_at, position)]
    for sender in senders:
        tokens = [token_at(sender.number, position) for position in range(sender.opened.position)]
        assert len(tokens) > 100
        assert replica.wire.state(sender.id) == replica.quiet_state(tokens)


def test_a_session_that_is_not_durable_is_gone_after_a_crash(replica: Replica) -> None:
    session = replica.session("fleeting", "NONE")
    session.step([1, 2, 3])
    replica.crash()
    expect(of_call(lambda: replica.get("fleeting")), "SESSION_NOT_FOUND", field="session_id")
    command, [request] = replica.stream.opening(MODEL, ["fleeting"], "ATTACH")
    replica.stream.send(command)
    expect(replica.stream.refusal(request), "SESSION_NOT_FOUND")
    assert replica.stream.open(MODEL, "fleeting").created


WANTED = outputs("every", top_k=2, next_token=True, logprobs=True, states=True, gates=True)


def test_answers_that_were_held_are_given_again_after_a_crash(replica: Replica) -> None:
    session = replica.session("held")
    stream = replica.stream
    runs = [[1], [2, 3, 4], [5, 6]]
    positions = [0, 1, 4]
    answers = [
        stream.answer(request) for request in stream.run([session.handle] * 3, runs, WANTED, positions=positions)
    ]
    stream.acknowledge(session.handle, 1)
    last = stream.step(session.handle, [7], position=6)  # whose checkpoint has the acknowledgement, too
    session.consumed([1, 2, 3, 4, 5, 6, 7])
    for _ in range(2):
        replica.crash()
        replica.attach(session)
        stream = replica.stream
        for run, position, answer in list(zip(runs, positions, answers, strict=True))[1:]:
            again = stream.step(session.handle, run, WANTED, position)
            assert again.position == answer.position
            assert again.outputs.keys() == answer.outputs.keys()
            for name, array in again.outputs.items():
                np.testing.assert_array_equal(array, answer.outputs[name])
        assert stream.step(session.handle, [7], position=6) == last
        expect(session.refuse([1], WANTED, position=0), "ANSWER_NOT_HELD", position=7)
        expect(session.refuse([5, 7], WANTED, position=4), "POSITION_CONFLICT", position=7)
        expect(session.refuse([5, 6], outputs(states=True), position=4), "ANSWER_NOT_HELD", position=7)
    session.step([8])
    replica.check_exactly(session)


def test_an_answer_that_the_crash_swallowed_is_given_after_it(replica: Replica) -> None:
    session = replica.session("swallowed")
    replica.stream.run([session.handle], [[1, 2, 3]], WANTED, positions=[0])
    while replica.get("swallowed").durable_position != 3:
        pass  # and the stream is not read
    replica.crash()
    session.consumed([1, 2, 3])
    replica.attach(session)
    again = replica.stream.step(session.handle, [1, 2, 3], WANTED, 0)
    expected = replica.stream.step(replica.session(durability="NONE").handle, [1, 2, 3], WANTED)
    assert again.outputs.keys() == expected.outputs.keys()
    for name, array in again.outputs.items():
        np.testing.assert_array_equal(array, expected.outputs[name])
    replica.check_exactly(session)


def rest(session: Follower, heard: Generated, wanted: int, **settings: Any) -> GenerateRequest:
    """The call that goes on where an earlier one was broken off."""
    position = heard.position or session.position
    return request_of(session, max_tokens=wanted - len(heard.tokens), position=position, **settings)


@pytest.mark.parametrize("durability", ["PERIODIC", "SYNC"])
def test_a_generate_goes_on_after_a_crash_with_the_tokens_of_a_quiet_day(replica: Replica, durability: str) -> None:
    settings: dict[str, Any] = {"seed": 77, "temperature": 0.9, "top_k": 7, "logprobs": True}
    session = replica.session("generating", durability)
    session.step([1, 2, 3])
    replica.stream.durable(session.handle, 3)
    heard = Generated()
    wanted = 1000  # in so many slices as answers are held
    for until in (100, 400):
        call = replica.wire.sessions.Generate(rest(session, heard, wanted, **settings), timeout=30)
        with pytest.raises(grpc.RpcError):
            for message in call:
                heard.take(message)
                if len(heard.tokens) > until:
                    replica.server.kill()
        assert not heard.finish_reason
        replica.crash()
        session.wire = replica.wire
        stored = replica.get("generating").position
        # What a periodic session has told and lost is generated again.
        lost = max(0, heard.position - stored)
        assert durability == "PERIODIC" or not lost
        del heard.tokens[len(heard.tokens) - lost :], heard.logprobs[len(heard.logprobs) - lost :]
        heard.position -= lost
    for message in replica.wire.sessions.Generate(rest(session, heard, wanted, **settings), timeout=30):
        heard.take(message)
    quiet = replica.session(durability="NONE")
    quiet.step([1, 2, 3])
    expected = generate(quiet, max_tokens=wanted, **settings)
    assert heard.tokens == expected.tokens
    assert heard.logprobs == expected.logprobs
    assert replica.wire.state("generating") == replica.wire.state(quiet.id)


@pytest.mark.parametrize("durability", ["PERIODIC", "SYNC"])
def test_checkpoints_fall_on_the_ends_of_runs(replica: Replica, durability: str) -> None:
    length, number = 4096, 2
    session = replica.session("long", durability)
    told = []
    for _ in range(2):
        handle, first = session.handle, session.position
        runs = [[(first + place) % 11 for place in range(length)]] * number
        replica.stream.run([handle] * number, runs, positions=[first, first + length])
        while replica.get("long").position % length == 0:
            pass
        replica.server.kill()
        with pytest.raises((EOFError, grpc.RpcError)):
            while True:
                replica.stream.read()
                told.append(replica.stream.account.durable_positions[handle])
        replica.crash()
        opened = replica.stream.open(MODEL, "long", "ATTACH")
        assert opened.position % length == 0
        assert opened.position >= max(told, default=0)
        session.attach(opened)
        for run in runs[: (opened.position - first) // length]:
            session.consumed(run)
    assert all(position % length == 0 for position in told)
    assert replica.wire.state(session.id) == replica.quiet_state(session.tokens)
