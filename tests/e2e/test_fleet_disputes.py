"""Two clients on two servers want the same session again and again: at any time it is one's, and never both's."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.support.refusals import Refused
from tests.support.replicas import MODEL, Replica, StartReplica
from tests.support.stream import Answer

NUM_TAKEOVERS = 25


@dataclass
class Sent:
    """A run as its sender knows it."""

    start: int
    tokens: list[int]
    is_answered: bool


@dataclass
class Fighter:
    """A client that takes the session, runs until it has lost it, and takes it again. Its tokens are its own."""

    replica: Replica
    tokens: Sequence[int]
    is_over: threading.Event
    sent: list[Sent] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    failure: BaseException | None = None

    def fight(self) -> None:
        try:
            while len(self.epochs) < NUM_TAKEOVERS and not self.is_over.is_set():
                self._hold()
        except BaseException as failure:
            self.failure = failure
        self.is_over.set()

    def _hold(self) -> None:
        stream = self.replica.stream
        opened = stream.open(MODEL, "s", "ATTACH")
        self.epochs.append(opened.epoch)
        position = opened.position
        for number in itertools.count():
            tokens = [self.tokens[(position + place) % len(self.tokens)] for place in range(1 + number % 3)]
            [request] = stream.run([opened.handle], [tokens], positions=[position])
            outcome = stream.outcome(request)
            self.sent.append(Sent(position, tokens, isinstance(outcome, Answer)))
            if isinstance(outcome, Refused):
                assert outcome.reason == "SESSION_MOVED", outcome
                self._wait_for_the_other(position)
                return
            position += len(tokens)
            if self.is_over.is_set():
                return

    def _wait_for_the_other(self, position: int) -> None:
        """Every other time the session is taken back only when the other one has done something with it."""
        if len(self.epochs) % 2:
            while self.replica.get("s").position <= position + 3 and not self.is_over.is_set():
                pass


def histories(sent: Sequence[Sent], end: int) -> Iterator[list[int]]:
    """Every sequence of runs up to a position that has all runs that were answered."""
    at: dict[int, list[Sent]] = {}
    for run in sent:
        at.setdefault(run.start, []).append(run)

    def go_on(position: int) -> Iterator[list[int]]:
        if position == end:
            yield []
        answered = [run for run in at.get(position, []) if run.is_answered]
        assert len(answered) <= 1, "two runs were answered for the same position"
        for run in answered or at.get(position, []):
            for rest in go_on(position + len(run.tokens)):
                yield [*run.tokens, *rest]

    return go_on(0)


def test_two_clients_on_two_servers_never_both_have_a_session(start_replica: StartReplica, redis_url: str) -> None:
    replicas = [start_replica(store=redis_url) for _ in range(2)]
    assert replicas[0].wire.open(MODEL, ["s"], durability="SYNC").created == [True]
    is_over = threading.Event()
    fighters = [
        Fighter(replica, tokens, is_over)
        for replica, tokens in zip(replicas, ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10)), strict=True)
    ]
    threads = [threading.Thread(target=fighter.fight) for fighter in fighters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fighter in fighters:
        if fighter.failure is not None:
            raise fighter.failure
        assert fighter.epochs == sorted(set(fighter.epochs))
        assert len(fighter.epochs) >= NUM_TAKEOVERS // 2
    # No two attaches were told the same epoch.
    assert not {*fighters[0].epochs} & {*fighters[1].epochs}
    state = replicas[0].wire.state("s")
    sent = [run for fighter in fighters for run in fighter.sent]
    assert sum(run.is_answered for run in sent) > NUM_TAKEOVERS
    found = list(itertools.islice(histories(sent, state.position), 200))
    assert any(replicas[1].quiet_state(tokens) == state for tokens in found)
    for run in sent:
        assert not run.is_answered or run.start + len(run.tokens) <= state.position
