"""Two engines on one store under clients that keep their tokens, whatever breaks, in any order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from cellserve.v1.stream_pb2 import Durability as ContractDurability
from cellserve.v1.stream_pb2 import OpenMode
from cellserve_service import messages
from cellserve_service.limits import EngineLimits
from cellserve_service.messages import InitialState, SessionTarget
from cellserve_service.outputs import NO_OUTPUTS, At, OutputSpec
from cellserve_service.sessions import Durability
from tests.service.fleet import Fleet, Replica
from tests.service.keeping_client import Asked, KeepingClient, Line, flipped
from tests.service.plain_store import Living
from tests.service.profiles import WITH_STORE
from tests.service.side_by_side import TOKENS, UNARY

DURABILITIES = {
    "a": Durability.PERIODIC,
    "b": Durability.SYNC,
    "c": Durability.SYNC,
    "d": Durability.PERIODIC,
    "n": Durability.NONE,
}
SPECS = (NO_OUTPUTS, OutputSpec(at=At.LAST, states=True), OutputSpec(at=At.EVERY, next_token=True, logprobs=True))
STRANGER = 77
LIMITS = EngineLimits(
    max_sessions=6,
    max_run_tokens=7,
    max_session_pending_tokens=60,
    idle_timeout_seconds=50.0,
    ended_session_memory_seconds=80.0,
    max_slice_tokens=2,
    max_checkpoints=2,
)
CREATING = (OpenMode.OPEN_MODE_UNSPECIFIED, OpenMode.OPEN_MODE_CREATE, OpenMode.OPEN_MODE_ATTACH_OR_CREATE)


class StoreMachine(RuleBasedStateMachine):
    """Clients do as they please; the rules decide when the store does what, and what breaks."""

    @initialize(
        num_slots=st.integers(1, 3),
        max_parked=st.integers(0, 1),
        max_sessions=st.sampled_from([3, 6]),
        evicts=st.booleans(),
    )
    def begin(self, num_slots: int, max_parked: int, max_sessions: int, evicts: bool) -> None:
        limits = replace(
            LIMITS, max_parked_states=max_parked, max_sessions=max_sessions, evict_when_full=evicts or max_sessions < 6
        )
        self.fleet = Fleet(limits, model=TOKENS, num_slots=num_slots, max_batch=2)
        for replica in self.fleet.replicas:
            replica.new_stream()
            replica.new_stream()
        self.clients = {
            name: KeepingClient(self.fleet, name, durability, holder=10 + place)
            for place, (name, durability) in enumerate(DURABILITIES.items())
        }
        self.draining: set[int] = set()
        for name in "abcn":
            client, replica = self.clients[name], self.fleet.replicas[name == "c"]
            client.open(replica, min(replica.streams), mode=OpenMode.OPEN_MODE_CREATE, state=None)
            replica.apply()
            replica.reply()

    # What the rules choose from.

    def _client(self, data: st.DataObject, *, born: bool | None = None) -> KeepingClient | None:
        names = [name for name, client in self.clients.items() if born is None or client.is_open == born]
        return self.clients[data.draw(st.sampled_from(names))] if names else None

    def _replica(self, data: st.DataObject, client: KeepingClient | None = None) -> Replica:
        """Mostly the one that has the session."""
        if client is not None and not client.is_durable:
            return self.fleet.replicas[client.home]
        choice = data.draw(st.integers(0, 3))
        if client is not None and client.grip is not None and choice:
            return client.grip.replica
        return self.fleet.replicas[choice % 2]

    def _stream(self, data: st.DataObject, replica: Replica) -> int:
        return data.draw(st.sampled_from(sorted(replica.streams)))

    # Clients.

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A client does what it needs: open, send, ask again."""
        client = self._client(data)
        assert client is not None
        self._go_on(data, client)

    def _go_on(self, data: st.DataObject, client: KeepingClient) -> None:
        replica = self._replica(data, client)
        if client.op is not None and not client.op.is_asked and not client.is_asking("echo", "generate"):
            client.send_op(replica, client.op)
        elif client.grip is None or client.must_open or (not client.is_open):
            self._open(data, client, replica)
        else:
            client.send(replica)

    def _open(self, data: st.DataObject, client: KeepingClient, replica: Replica) -> None:
        is_coming = any(other.op is not None and other.op.name == client.id for other in self.clients.values())
        if client.is_asking("open") or (client.line is None and (client.asked or is_coming)):
            return
        state = None
        if client.is_open:
            modes = [OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_RESUME]
            mode = data.draw(st.sampled_from(modes))
        else:
            mode = data.draw(st.sampled_from([*CREATING, OpenMode.OPEN_MODE_ATTACH]))
            if data.draw(st.integers(0, 3)) == 0:
                state = self._state(data)
        client.open(replica, self._stream(data, replica), mode=mode, state=state)

    def _state(self, data: st.DataObject) -> InitialState:
        value = data.draw(st.integers(1, 90))
        return InitialState(TOKENS.fingerprint, data.draw(st.integers(0, 9)), np.full((2, 3), value, np.float32))

    @rule(data=st.data(), spec=st.sampled_from(SPECS), send=st.booleans())
    def run(self, data: st.DataObject, spec: OutputSpec, send: bool) -> None:
        client = self._client(data, born=True)
        if client is not None and client.op is None:
            tokens = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
            client.add_run(tokens, spec)
            if send and not client.must_open:
                client.send(self._replica(data, client))

    @rule(data=st.data(), number=st.integers(1, 36), send=st.booleans())
    def generate(self, data: st.DataObject, number: int, send: bool) -> None:
        client = self._client(data, born=True)
        if client is not None and client.op is None and client.line is not None:
            client.add_generate(number, seed=data.draw(st.integers(0, 50)))
            if send and not client.must_open:
                client.send(self._replica(data, client))

    @rule(data=st.data())
    def repeat_generate(self, data: st.DataObject) -> None:
        """The same call again, as if the connection of the first one were lost."""
        client = self._client(data, born=True)
        if client is None or client.op is not None or client.is_asking("generate"):
            return
        generates = [sent for sent in client.runs if sent.seed is not None and sent not in client.unsent]
        generates = [sent for sent in generates if sent.position >= client.acknowledged]
        if generates and generates[-1] is client.runs[-1]:
            client.send_generate(self._replica(data, client), generates[-1])

    @rule(data=st.data(), kind=st.sampled_from(["reset", "import", "rollback", "checkpoint", "fork", "close"]))
    def operate(self, data: st.DataObject, kind: str) -> None:
        client = self._client(data, born=True)
        if client is None or client.op is not None or client.is_asking("echo", "again", "generate", "look"):
            return
        name, target = "", None
        match kind:
            case "reset":
                target = Line(TOKENS, 0, TOKENS.zero_state())
            case "import":
                state = self._state(data)
                target = Line(TOKENS, state.position, state.values)
            case "checkpoint":
                name = data.draw(st.sampled_from(["one", "two"]))
            case "rollback":
                if not client.marks:
                    return
                name = data.draw(st.sampled_from(sorted(client.marks)))
                target = Line(TOKENS, *client.marks[name])
            case "fork":
                free = [
                    other.id
                    for other in self.clients.values()
                    if not (other.is_open or other.tried or other.asked) and other.durability == client.durability
                ]
                if not free:
                    return
                name = free[0]
                self.clients[name].tried = True
        client.begin_op(kind, name=name, target=target)
        assert client.op is not None
        client.send_op(self._replica(data, client), client.op)
        self._take_forks()

    def _take_forks(self) -> None:
        for client in self.clients.values():
            for name, line in client.forks:
                self.clients[name].adopt(line)
            client.forks.clear()

    @rule(data=st.data())
    def repeat_operation(self, data: st.DataObject) -> None:
        """The last operation that was answered is asked for again: the same answer, and nothing changes."""
        client = self._client(data)
        if client is None or client.op is not None or client.last_op is None or not client.is_durable:
            return
        op = client.last_op
        if op.kind == "close":
            if client.is_open or client.birth is not None or client.tried:  # it may live again
                return
        elif op.kind == "fork" or not client.is_open or client.is_asking("generate", "echo"):
            return
        client.send_op(self._replica(data), op, again=True)

    @rule(data=st.data())
    def echo(self, data: st.DataObject) -> None:
        client = self._client(data, born=True)
        if client is None or client.op is not None:
            return
        runs = [sent for sent in client.runs if sent.seed is None and sent not in client.unsent]
        if runs:
            client.echo(self._replica(data, client), runs[data.draw(st.integers(0, len(runs) - 1))])

    @rule(data=st.data(), kind=st.sampled_from(["acknowledge", "detach", "cancel", "export", "get"]))
    def by_the_way(self, data: st.DataObject, kind: str) -> None:
        client = self._client(data, born=True)
        if client is None:
            return
        grip = client.grip
        match kind:
            case "acknowledge":
                if grip is not None and client.op is None and not client.must_open:
                    client.acknowledge()
            case "detach":
                if grip is not None:
                    client.detach()
            case "cancel":
                runs = [key for key, asked in client.asked.items() if asked.kind in ("run", "echo", "generate")]
                if runs:
                    replica, stream, request = runs[data.draw(st.integers(0, len(runs) - 1))]
                    replica.handle(messages.CancelRuns(stream, np.array([request], np.uint64)))
            case _:
                replica = self._replica(data, client)
                [request] = replica.ask(UNARY)
                client.asked[replica, UNARY, request] = Asked("look")
                target = SessionTarget(UNARY, np.array([request], np.uint64), session_ids=[client.id])
                look = messages.ExportSession(target) if kind == "export" else messages.GetSession(target)
                replica.handle(look)

    @rule(data=st.data(), resumes=st.booleans())
    def take_over(self, data: st.DataObject, resumes: bool) -> None:
        """A stranger attaches the session, and lets it lie."""
        client = self._client(data, born=True)
        if client is None:
            return
        replica = self._replica(data, client)
        stream = self._stream(data, replica)
        [request] = replica.ask(stream)
        client.asked[replica, stream, request] = Asked("stranger")
        client.stranger_asked = True
        mode = OpenMode.OPEN_MODE_RESUME if resumes else OpenMode.OPEN_MODE_ATTACH
        replica.handle(
            messages.OpenSessions(
                stream,
                np.array([request], np.uint64),
                TOKENS.name,
                [client.id],
                mode,
                ContractDurability.DURABILITY_UNSPECIFIED,
                None,
                holders=np.array([STRANGER], np.uint64),
            )
        )

    @rule(data=st.data(), page_size=st.integers(1, 3))
    def list_page(self, data: st.DataObject, page_size: int) -> None:
        replica = self._replica(data)
        [request] = replica.ask(UNARY)
        replica.handle(messages.ListSessions(UNARY, request, "", data.draw(st.sampled_from(["", "b"])), page_size))

    # Processes, the store, and time.

    @rule(data=st.data(), rounds=st.integers(1, 3))
    def work(self, data: st.DataObject, rounds: int) -> None:
        """A quiet while: everybody does what is due."""
        for _ in range(rounds):
            for client in list(self.clients.values()):
                self._go_on(data, client)
            for replica in self.fleet.replicas:
                replica.tick()
                replica.reply()
                replica.apply()
                replica.reply()
            self._take_forks()

    @rule(data=st.data(), times=st.integers(1, 4))
    def tick(self, data: st.DataObject, times: int) -> None:
        replica = self._replica(data)
        for _ in range(times):
            replica.tick()
        self._take_forks()

    @rule(data=st.data(), what=st.sampled_from(["apply", "reply", "both", "both", "both"]))
    def use_store(self, data: st.DataObject, what: str) -> None:
        replica = self._replica(data)
        if replica.keeper.has_replies or what == "reply":
            replica.reply()
        if what in ("apply", "both"):
            replica.apply()
        if what == "both":
            replica.reply()
        self._take_forks()

    @rule(data=st.data(), seconds=st.sampled_from([0.5, 0.5, 2.0, 2.0, 2.0, 30.0, 100.0]))
    def pass_time(self, data: st.DataObject, seconds: float) -> None:
        if seconds >= 30.0:  # no outage lasts so long that sessions in use expire
            for replica in self.fleet.replicas:
                replica.checkpoint()
                replica.settle()
            self._take_forks()
        self.fleet.now += seconds
        for replica in self.fleet.replicas:
            replica.sweep()
        self._replica(data).checkpoint()

    @rule(data=st.data(), kind=st.sampled_from(["break", "break", "crash", "stream", "notice", "lose notice", "drain"]))
    def trouble(self, data: st.DataObject, kind: str) -> None:
        place = data.draw(st.integers(0, 1))
        replica = self.fleet.replicas[place]
        match kind:
            case "break":
                replica.reply()
                replica.fail(applied=data.draw(st.booleans()))
                if data.draw(st.booleans()):
                    replica.reply()
                self._take_forks()
            case "crash":
                self._crash(place)
            case "stream":
                self._end_stream(replica, self._stream(data, replica))
            case "notice" | "lose notice" if self.fleet.notices:
                number = data.draw(st.integers(0, len(self.fleet.notices) - 1))
                if kind == "notice":
                    self.fleet.tell_notice(number)
                else:
                    del self.fleet.notices[number]
            case "drain" if place not in self.draining and data.draw(st.integers(0, 2)) == 0:
                self.draining.add(place)
                replica.handle(messages.Drain(30.0))

    def _crash(self, place: int) -> None:
        lost = self.fleet.replicas[place]
        self.draining.discard(place)
        for client in self.clients.values():
            client.drop_stream(lost, None)
        self.fleet.crash(place)
        for _ in range(2):
            self.fleet.replicas[place].new_stream()

    def _end_stream(self, replica: Replica, stream: int) -> None:
        for client in self.clients.values():
            client.drop_stream(replica, stream)
        replica.end_stream(stream)
        replica.new_stream()

    @rule(data=st.data(), luck=st.integers(0, 3), place=st.integers(0, 1000))
    def damage(self, data: st.DataObject, luck: int, place: int) -> None:
        client = self._client(data, born=True)
        if luck or client is None or client.op is not None:
            return
        found = self.fleet.store._sessions.get(client.id)
        if isinstance(found, Living) and client.is_durable:
            client.is_damaged = True
            row = replace(found.row, blob=flipped(found.row.blob, place))
            self.fleet.store._sessions[client.id] = replace(found, row=row)

    # The end: everything heals, and everybody gets what was asked for.

    def teardown(self) -> None:
        # After a failure there is nothing to add.
        if hasattr(self, "fleet") and self.fleet.is_sound:
            self._restart_drained()
            self._settle_clients()
            for client in self.clients.values():
                if client.is_open:
                    client.begin_op("close")
            self._settle_clients()
            assert not any(client.is_open for client in self.clients.values())
            # What a replica does not know to be another's by now, it forgets in time.
            self.fleet.now += 1000
            for replica in self.fleet.replicas:
                replica.sweep()
                replica.settle()
                replica.check_nothing_left()

    def _restart_drained(self) -> None:
        """What a process has drained, it has stored."""
        for place in sorted(self.draining):
            replica = self.fleet.replicas[place]
            replica.settle()
            self._take_forks()
            replica.settle()
            assert replica.is_drained
            for client in self.clients.values():
                holds = client.grip is not None and client.grip.replica is replica
                if holds and self.fleet.owner(client.id) == replica.number:
                    client.check_drained()
            self._crash(place)

    def _settle_clients(self) -> None:
        for _ in range(40):
            for client in self.clients.values():
                self._go_on_quietly(client)
            for replica in self.fleet.replicas:
                replica.checkpoint()
                replica.settle()
            self._take_forks()
            if all(client.is_settled for client in self.clients.values()):
                return
        raise AssertionError([client for client in self.clients.values() if not client.is_settled])

    def _go_on_quietly(self, client: KeepingClient) -> None:
        replica = self.fleet.replicas[client.home] if client.grip is None else client.grip.replica
        if client.is_damaged and client.is_open and client.op is None:
            client.begin_op("close")
        if client.op is not None:
            if not client.op.is_asked and not client.is_asking("echo", "generate"):
                client.send_op(replica, client.op)
        elif not client.is_open or client.is_settled or client.is_asking("open"):
            return
        elif client.grip is None or client.must_open:
            client.open(replica, min(replica.streams), mode=OpenMode.OPEN_MODE_ATTACH, state=None)
        else:
            client.send(replica)


def test_a_client_that_keeps_its_tokens_never_notices_crashes_and_outages() -> None:
    run_state_machine_as_test(StoreMachine, settings=WITH_STORE)
