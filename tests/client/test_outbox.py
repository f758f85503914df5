"""What is asked for at the same moment shares commands, without the rows of a session overtaking each other."""

from array import array

import numpy as np
import pytest

from cellserve._info import ServerLimits
from cellserve._outbox import OpenKey, Outbox
from cellserve._outputs import OutputSpec
from cellserve.v1.stream_pb2 import Command, Durability, OpenMode, StreamRequest


def make_spec(name: bytes = b"", *, takes_vectors: bool = False) -> OutputSpec:
    return OutputSpec(at="none", encoded=name, top_k=0, gate_names=(), takes_vectors=takes_vectors)


def make_outbox(max_message_bytes: int = 4096, max_open_sessions: int = 100) -> tuple[Outbox, list[None]]:
    wakes: list[None] = []
    limits = ServerLimits(
        max_run_tokens=64,
        max_session_pending_tokens=64,
        max_message_bytes=max_message_bytes,
        max_open_sessions=max_open_sessions,
        max_held_answers=64,
        max_held_answer_bytes=65536,
    )
    return Outbox(limits, lambda: wakes.append(None)), wakes


class Sender:
    """A session as far as the outbox knows one: it remembers the command that has its last row."""

    def __init__(self, outbox: Outbox, handle: int) -> None:
        self.outbox = outbox
        self.handle = handle
        self.after = 0

    def run(self, spec: OutputSpec, request: int, tokens: "int | array[int]" = 5) -> None:
        count = 1 if isinstance(tokens, int) else len(tokens)
        self.after = self.outbox.add_run(self.after, spec, request, self.handle, tokens, count, 10 * request, 1000, 0)


def commands(outbox: Outbox) -> list[Command]:
    (frame,) = outbox.take()
    return list(StreamRequest.FromString(frame).commands)


def test_runs_that_ask_for_the_same_share_one_command_of_one_frame() -> None:
    outbox, wakes = make_outbox()
    spec = make_spec()
    for request in range(1, 5):
        Sender(outbox, 100 + request).run(spec, request, request)
    assert len(wakes) == 1
    (command,) = commands(outbox)
    assert list(command.run.requests) == [1, 2, 3, 4]
    assert list(command.run.handles) == [101, 102, 103, 104]
    assert list(command.run.tokens) == [1, 2, 3, 4]
    assert list(command.run.positions) == [10, 20, 30, 40]
    assert list(command.run.counts) == []


def test_runs_that_ask_for_different_outputs_have_commands_of_their_own() -> None:
    outbox, _ = make_outbox()
    first, second = make_spec(), make_spec()
    for request, spec in enumerate([first, second, first, second], start=1):
        Sender(outbox, request).run(spec, request)
    assert [list(command.run.requests) for command in commands(outbox)] == [[1, 3], [2, 4]]


def test_a_session_never_overtakes_itself_where_its_runs_ask_for_different_outputs() -> None:
    outbox, _ = make_outbox()
    first, second = make_spec(), make_spec()
    other, session = Sender(outbox, 1), Sender(outbox, 2)
    other.run(first, 1)
    session.run(first, 2)
    session.run(second, 3)
    session.run(first, 4)  # not into the first command, which stands before request 3
    other.run(first, 5)
    assert [list(command.run.requests) for command in commands(outbox)] == [[1, 2], [3], [4, 5]]


def test_a_close_stands_behind_the_runs_of_its_session() -> None:
    outbox, _ = make_outbox()
    spec = make_spec()
    one, two = Sender(outbox, 1), Sender(outbox, 2)
    one.after = outbox.add_close(one.after, 1, one.handle)
    two.run(spec, 2)
    two.after = outbox.add_close(two.after, 3, two.handle)
    kinds = [(command.WhichOneof("command"), list(command.close.handles)) for command in commands(outbox)]
    assert kinds == [("close", [1]), ("run", []), ("close", [2])]


def test_a_withdrawal_stands_behind_its_run() -> None:
    outbox, _ = make_outbox()
    session = Sender(outbox, 1)
    session.run(make_spec(), 9)
    session.after = outbox.add_cancel(session.after, 9)
    run, cancel = commands(outbox)
    assert list(run.run.requests) == [9]
    assert list(cancel.cancel.runs) == [9]


def test_resets_and_acknowledgements_are_columns() -> None:
    outbox, _ = make_outbox()
    for request in (1, 2):
        outbox.add_detach(0, request, 10 + request)
        outbox.add_acknowledge(0, 20 + request, 7)
    detach, acknowledge = commands(outbox)
    assert (list(detach.detach.requests), list(detach.detach.handles)) == ([1, 2], [11, 12])
    assert (list(acknowledge.acknowledge.handles), list(acknowledge.acknowledge.positions)) == ([21, 22], [7, 7])


def test_a_taken_command_takes_no_more_rows_and_the_outbox_wakes_again() -> None:
    outbox, wakes = make_outbox()
    spec, session = make_spec(), Sender(outbox, 1)
    session.run(spec, 1)
    assert [list(command.run.requests) for command in commands(outbox)] == [[1]]
    assert outbox.take() == []
    session.run(spec, 2)
    assert len(wakes) == 2
    assert [list(command.run.requests) for command in commands(outbox)] == [[2]]


def test_long_and_short_runs_share_a_command_with_their_counts() -> None:
    outbox, _ = make_outbox()
    spec = make_spec()
    Sender(outbox, 1).run(spec, 1, 4)
    Sender(outbox, 2).run(spec, 2, array("I", [5, 6, 7]))
    (command,) = commands(outbox)
    assert list(command.run.counts) == [1, 3]
    assert list(command.run.tokens) == [4, 5, 6, 7]


def test_vectors_of_many_sessions_are_one_block() -> None:
    outbox, _ = make_outbox()
    spec = make_spec(takes_vectors=True)
    for request in (1, 2):
        vectors = np.full((request, 2), request, dtype=np.float32)
        outbox.add_run(0, spec, request, request, vectors, request, 0, 1, 0)
    (command,) = commands(outbox)
    assert list(command.run.vectors.shape) == [3, 2]
    assert np.frombuffer(command.run.vectors.values, "<f4").tolist() == [1, 1, 2, 2, 2, 2]
    assert list(command.run.tokens) == []


def test_what_is_too_much_for_one_message_goes_into_several_in_order() -> None:
    outbox, _ = make_outbox(max_message_bytes=1024)
    spec = make_spec(b"")
    for request in range(1, 101):
        Sender(outbox, request).run(spec, request)
    frames = outbox.take()
    assert len(frames) > 1
    assert all(len(frame) <= 1024 for frame in frames)
    runs = [command.run for frame in frames for command in StreamRequest.FromString(frame).commands]
    assert [request for run in runs for request in run.requests] == list(range(1, 101))


def test_small_commands_share_a_frame_as_long_as_they_fit() -> None:
    outbox, _ = make_outbox(max_message_bytes=1024)
    for number in range(1, 41):
        Sender(outbox, number).run(make_spec(), number)
    frames = outbox.take()
    assert all(len(frame) <= 1024 for frame in frames)
    assert 2 <= len(frames) < 8
    requests = [command.run.requests[0] for frame in frames for command in StreamRequest.FromString(frame).commands]
    assert requests == list(range(1, 41))


def key(*, has_states: bool = False, model: str = "m", durable: bool = False) -> OpenKey:
    return OpenKey(
        model=model,
        mode=OpenMode.OPEN_MODE_ATTACH_OR_CREATE,
        durability=Durability.DURABILITY_SYNC if durable else Durability.DURABILITY_UNSPECIFIED,
        has_states=has_states,
    )


def test_opens_of_one_kind_share_a_command() -> None:
    outbox, _ = make_outbox()
    outbox.add_open(key(), 1, "a", 11, None)
    outbox.add_open(key(durable=True), 2, "x", 12, None)
    outbox.add_open(key(), 3, "b", 13, None)
    outbox.add_open(key(model="n"), 4, "c", 14, None)
    outbox.add_open(key(durable=True), 5, "y", 15, None)
    opens = [command.open for command in commands(outbox)]
    assert [(each.model, list(each.requests), list(each.session_ids), list(each.holders)) for each in opens] == [
        ("m", [1, 3], ["a", "b"], [11, 13]),
        ("m", [2, 5], ["x", "y"], [12, 15]),
        ("n", [4], ["c"], [14]),
    ]


def test_the_same_id_twice_is_opened_by_two_commands() -> None:
    outbox, _ = make_outbox()
    for request in (1, 2):
        outbox.add_open(key(), request, "a", 1, None)
    assert [list(command.open.requests) for command in commands(outbox)] == [[1], [2]]


def test_opens_beyond_the_servers_number_of_rows_are_split() -> None:
    outbox, _ = make_outbox(max_open_sessions=3)
    for request in range(1, 8):
        outbox.add_open(key(), request, f"session-{request}", 1, None)
    opens = [command.open for command in commands(outbox)]
    assert [len(each.requests) for each in opens] == [3, 3, 1]
    assert [name for each in opens for name in each.session_ids] == [f"session-{n}" for n in range(1, 8)]


@pytest.mark.parametrize("num_states", [1, 5])
def test_states_are_opened_in_messages_that_the_server_takes(num_states: int) -> None:
    outbox, _ = make_outbox(max_message_bytes=4096)
    states = [bytes([number]) * 1500 for number in range(num_states)]
    for number, state in enumerate(states):
        outbox.add_open(key(has_states=True), number + 1, f"s{number}", 1, state)
    frames = outbox.take()
    assert all(len(frame) <= 4096 for frame in frames)
    opens = [command.open for frame in frames for command in StreamRequest.FromString(frame).commands]
    assert [state for each in opens for state in each.states] == states
