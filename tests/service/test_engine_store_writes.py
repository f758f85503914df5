"""How much waits for a store that is slow or does not answer: of each session one write, however far it runs on."""

import numpy as np
import pytest

from cellserve.v1.stream_pb2 import Durability, OpenMode
from cellserve_service import messages
from cellserve_service.engine import Engine
from cellserve_service.limits import EngineLimits
from cellserve_service.outputs import NO_OUTPUTS
from cellserve_service.statistics import Statistics
from cellserve_service.store_requests import AskStore, WriteSessions
from cellserve_service.stores.operations import Claimed, ClaimResult, Written
from tests.support.steppers import FakeModel, FakeStepper

STREAM = 1
NUM_RUNS = 50


class Kept:
    """An engine with one durable session, and the store's side of it in the test's hands."""

    def __init__(self, durability: Durability.ValueType) -> None:
        model = FakeModel()
        self.engine = Engine([FakeStepper(model)], EngineLimits(max_sessions=4), Statistics(), has_store=True)
        self.now = 100.0
        self.answered: list[int] = []
        self.durable: list[int] = []
        self.handle(messages.StartStream(STREAM))
        self.handle(
            messages.OpenSessions(
                stream=STREAM,
                requests=np.array([1], np.uint64),
                model=model.name,
                session_ids=["s"],
                mode=OpenMode.OPEN_MODE_CREATE,
                durability=durability,
                states=None,
            )
        )
        [asked] = self.engine.take_store_requests()
        assert isinstance(asked, AskStore)
        self.handle(messages.StoreReply(lambda: asked.done([Claimed(ClaimResult.CREATED, 1)])))
        [opened] = [event for event in self.opened if isinstance(event, messages.Opened)]
        self.session = opened.handles

    def handle(self, command: messages.Command) -> None:
        """Give the engine a command, and let it tick until nothing is left to do."""
        self.now += 0.01
        self.engine.handle(command, self.now)
        while (tick := self.engine.begin_tick(self.now)) is not None:
            self.engine.finish_tick(tick, self.engine.collect(tick), self.now)
        self.opened = self.engine.take_events()
        for event in self.opened:
            if isinstance(event, messages.Answers):
                self.answered += event.positions.tolist()
            elif isinstance(event, messages.DurablePositions):
                self.durable += event.positions.tolist()

    def run(self, position: int) -> None:
        """One token, and the checkpoint after it."""
        self.handle(
            messages.SubmitRuns(
                streams=np.array([STREAM]),
                requests=np.array([100 + position], np.uint64),
                handles=self.session,
                session_ids=None,
                counts=np.array([1]),
                tokens=np.array([position % 7], np.uint32),
                vectors=None,
                positions=np.array([position]),
                timeouts_seconds=None,
                acknowledged=None,
                outputs=NO_OUTPUTS,
            )
        )
        self.engine.begin_checkpoint(self.now)
        self.engine.write_due(self.now)

    def take_write(self) -> WriteSessions:
        """The one write that is asked of the store now."""
        [write] = self.engine.take_store_requests()
        assert isinstance(write, WriteSessions)
        return write

    def written(self, write: WriteSessions) -> None:
        self.handle(messages.StoreReply(lambda: write.done([Written.WRITTEN])))


@pytest.mark.parametrize("durability", [Durability.DURABILITY_PERIODIC, Durability.DURABILITY_SYNC])
def test_a_session_has_one_write_on_its_way_at_a_time(durability: Durability.ValueType) -> None:
    kept = Kept(durability)
    for position in range(NUM_RUNS):
        kept.run(position)
    everything = list(range(1, NUM_RUNS + 1))
    assert kept.answered == (everything if durability == Durability.DURABILITY_PERIODIC else [])
    first = kept.take_write()
    assert first.snapshot.positions.tolist() == [1]
    kept.written(first)
    # All that came meanwhile is in the second one.
    second = kept.take_write()
    assert second.snapshot.positions.tolist() == [NUM_RUNS]
    kept.written(second)
    assert kept.engine.take_store_requests() == []
    assert kept.answered == everything
    assert kept.durable == [1, NUM_RUNS]
