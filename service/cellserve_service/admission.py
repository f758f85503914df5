"""Decides over runs that come in: validated whole, checked against the session's position, then accepted whole.

n rows of commands, N tokens in all.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.arrivals import Arrivals
from cellserve_service.core import Core, JoinedRequest
from cellserve_service.errors import Refusal, invalid
from cellserve_service.merging import joined
from cellserve_service.messages import Acknowledge, SubmitRuns
from cellserve_service.replay import replay
from cellserve_service.runs import Kind
from cellserve_service.served import ServedModel
from cellserve_service.sessions import NO_ROW, NO_RUN, Durability
from cellserve_service.stepping import IntArray
from cellserve_service.tables import zeros
from cellserve_service.validation import check_answer_size, check_input, check_models, refuse

_BUSY = Refusal(ErrorReason.ERROR_REASON_SESSION_BUSY, "a generate is under way on the session")
_DRAINING = Refusal(ErrorReason.ERROR_REASON_DRAINING, "the server is draining and takes no more runs")
_UNANSWERED = invalid("the session has an unanswered run: more than one at once need positions", "positions")


class Admission:
    """Accepts runs into the run tables."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._place_by_row = zeros(core.sessions.capacity, np.int32)

    def submit(self, commands: Sequence[SubmitRuns]) -> None:
        """Accept the rows of commands that are alike or refuse them, row by row; accepted ones are queued."""
        arrivals = self._resolve(commands)
        if len(arrivals):
            for of_model in self._by_model(arrivals):
                self._submit(commands[0], of_model)

    def _submit(self, command: SubmitRuns, arrivals: Arrivals) -> None:
        """The same for rows that should all be of the first one's model. command: tells what they ask for."""
        core = self._core
        different = self._are_different(arrivals.rows)
        if arrivals.acknowledged is not None:
            self._acknowledge(arrivals.rows, arrivals.acknowledged, different)
        arrivals = check_models(core, arrivals)
        served = core.model_of(int(arrivals.rows[0]))
        spec = served.specs.number(command.outputs, core.limits.max_answer_bytes)
        if isinstance(spec, Refusal):
            refuse(core, arrivals, np.ones(len(arrivals), np.bool_), spec)
            return
        arrivals = check_input(core, served, arrivals)
        if command.max_output_bytes is not None:
            arrivals = check_answer_size(core, served, arrivals, spec, command.max_output_bytes)
        if len(arrivals):
            for turn in [arrivals] if different else self._turns(arrivals):
                self._admit(served, spec, turn)

    def acknowledge(self, command: Acknowledge) -> None:
        """Let go of held answers; handles that are not valid are passed over."""
        rows, valid = self._core.sessions.resolve_handles(command.stream, command.handles)
        rows, positions = rows[valid], command.positions[valid]
        self._acknowledge(rows, positions, self._are_different(rows))

    def _by_model(self, arrivals: Arrivals) -> Iterator[Arrivals]:
        """The rows by the model of the first one of the same stream and command."""
        models = self._core.sessions.model[arrivals.rows]
        if len(self._core.served) == 1 or not np.count_nonzero(models != models[0]):
            yield arrivals
            return
        streams, commands = arrivals.streams, arrivals.commands
        begins = np.append(True, streams[1:] != streams[:-1])
        if commands is not None:
            begins[1:] |= commands[1:] != commands[:-1]
        of_first = models[begins][begins.cumsum() - 1]
        for model in np.unique(of_first):
            yield arrivals.at(np.flatnonzero(of_first == model))

    def _look_up(self, commands: Sequence[SubmitRuns]) -> tuple[IntArray, NDArray[np.bool_], IntArray]:
        """Where in the session table each row's session stands, whether there is one, and the stream: (n,) each."""
        sessions = self._core.sessions
        streams = joined([command.streams for command in commands])
        if commands[0].handles is not None:
            rows, valid = sessions.resolve_handles(streams, joined([command.handles for command in commands]))
        else:
            ids = [session_id for command in commands for session_id in command.session_ids or ()]
            rows = np.array([sessions.row_by_id.get(session_id, NO_ROW) for session_id in ids], np.int64)
            valid = rows != NO_ROW
        return rows, valid, streams

    def _resolve(self, commands: Sequence[SubmitRuns]) -> Arrivals:
        """The rows whose sessions there are; the others are refused."""
        rows, valid, streams = self._look_up(commands)
        arrivals = Arrivals.of(commands, streams, rows)
        if np.count_nonzero(valid) == len(valid):
            return arrivals
        names: list[int | str] = [
            name
            for command in commands
            for name in (command.session_ids or () if command.handles is None else command.handles.tolist())
        ]
        refusals = [self._why_missing(int(streams[place]), names[place]) for place in np.flatnonzero(~valid).tolist()]
        return refuse(self._core, arrivals, ~valid, refusals)

    def _why_missing(self, stream: int, name: int | str) -> Refusal:
        """Why a handle of a stream, or an id, means no session."""
        if isinstance(name, int):
            return self._core.sessions.refuse_handle(stream, name)
        refusal = self._core.sessions.resolve_id(name)
        assert isinstance(refusal, Refusal)
        return refusal

    def _are_different(self, rows: IntArray) -> bool:
        places = np.arange(len(rows), dtype=np.int32)
        self._place_by_row[rows] = places
        return bool(np.count_nonzero(self._place_by_row[rows] == places) == len(rows))

    def _acknowledge(self, rows: IntArray, positions: IntArray, different: bool) -> None:
        """Let go of held answers of sessions up to the positions; the highest where a session stands twice."""
        if not different:
            order = np.lexsort((positions, rows))
            rows, positions = rows[order], positions[order]
            highest = np.append(rows[1:] != rows[:-1], True)
            rows, positions = rows[highest], positions[highest]
        core = self._core
        while len(rows):
            served = core.model_of(int(rows[0]))
            of_model = core.sessions.model[rows] == served.index
            if np.count_nonzero(of_model) == len(rows):
                served.runs.acknowledge(rows, positions)
                return
            served.runs.acknowledge(rows[of_model], positions[of_model])
            rows, positions = rows[~of_model], positions[~of_model]

    def _turns(self, arrivals: Arrivals) -> Iterator[Arrivals]:
        """The rows in turns of different sessions: rows of the same session take effect in their order."""
        rows = arrivals.rows
        order = rows.argsort(kind="stable")
        first = np.flatnonzero(np.append(True, rows[order[1:]] != rows[order[:-1]]))
        turn = np.empty(len(rows), np.int64)
        turn[order] = np.arange(len(rows)) - np.repeat(first, np.diff(np.append(first, len(rows))))
        # So many runs of one session can never wait at once; to decide over each would only take time.
        full = turn >= self._core.limits.max_session_pending_tokens
        arrivals, turn = refuse(self._core, arrivals, full, self._full("session")), turn[~full]
        by_turn = turn.argsort(kind="stable")  # within a turn as in the command
        for places in np.split(by_turn, np.flatnonzero(np.diff(turn[by_turn])) + 1):
            yield arrivals.at(places)

    def _admit(self, served: ServedModel, spec: int, arrivals: Arrivals) -> None:
        """Check the positions of runs of different sessions, answer repeats, and accept what there is room for."""
        core, sessions = self._core, self._core.sessions
        if core.generations:
            arrivals = refuse(core, arrivals, sessions.is_generating[arrivals.rows], _BUSY)
        if arrivals.positions is None:
            arrivals = refuse(core, arrivals, sessions.next_run[arrivals.rows] != NO_RUN, _UNANSWERED)
        else:
            fresh = arrivals.positions == sessions.accepted[arrivals.rows]
            if np.count_nonzero(fresh) < len(fresh):
                self._answer_repeats(served, spec, arrivals.at(np.flatnonzero(~fresh)))
                arrivals = arrivals.at(np.flatnonzero(fresh))
        if core.is_draining:
            refuse(core, arrivals, np.ones(len(arrivals), np.bool_), _DRAINING)
            return
        if core.keeping is not None and (trouble := core.keeping.unavailable()) is not None:
            # Their answers could not leave.
            arrivals = refuse(core, arrivals, sessions.durability[arrivals.rows] == Durability.SYNC, trouble)
        arrivals = self._within_limits(arrivals)
        if len(arrivals):
            self._accept(served, spec, arrivals)

    def _answer_repeats(self, served: ServedModel, spec: int, arrivals: Arrivals) -> None:
        """Answer runs that are not for where their sessions stand, or refuse them."""
        core, digests = self._core, arrivals.digests().tolist()
        deadlines = np.broadcast_to(self._deadlines(arrivals), len(arrivals)).tolist()
        assert arrivals.positions is not None
        columns = (arrivals.streams, arrivals.rows, arrivals.positions, arrivals.counts, arrivals.requests)
        for place, (stream, row, position, count, request) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            accepted = int(core.sessions.accepted[row])
            refusal: Refusal | None
            if position + count <= accepted:
                asked = JoinedRequest(stream, request, core.now, deadlines[place])
                refusal = replay(core, served, row, position, count, digests[place], spec, asked)
            else:
                refusal = _off_position(position, count, accepted)
            if refusal is not None:
                core.refuse(stream, [request], [refusal])

    def _within_limits(self, arrivals: Arrivals) -> Arrivals:
        """The rows whose tokens there is room for; the others are refused."""
        core, limits, counts = self._core, self._core.limits, arrivals.counts
        full = core.sessions.num_pending_tokens[arrivals.rows] + counts > limits.max_session_pending_tokens
        if np.count_nonzero(full):
            arrivals = refuse(core, arrivals, full, self._full("session"))
        num_left = limits.max_pending_tokens - core.num_pending_tokens
        if len(arrivals.tokens) <= num_left:
            return arrivals
        too_many = np.zeros(len(arrivals), np.bool_)
        for place, count in enumerate(arrivals.counts.tolist()):
            too_many[place] = count > num_left
            num_left -= 0 if too_many[place] else count
        return refuse(core, arrivals, too_many, self._full("server"))

    def _full(self, whose: str) -> Refusal:
        name = "max_session_pending_tokens" if whose == "session" else "max_pending_tokens"
        message = f"the {whose} has too many tokens waiting: {name} {getattr(self._core.limits, name)}"
        return Refusal(ErrorReason.ERROR_REASON_QUEUE_FULL, message)

    def _accept(self, served: ServedModel, spec: int, arrivals: Arrivals) -> None:
        core, sessions, table = self._core, self._core.sessions, served.runs
        rows, counts = arrivals.rows, arrivals.counts
        start = sessions.accepted[rows]
        runs = table.allocate(len(rows), Kind.RUN)
        asked = table.ask(runs, arrivals.streams, arrivals.requests, core.now, self._deadlines(arrivals))
        table.requests.put_tokens(asked, counts, arrivals.tokens)
        table.session[runs] = rows.astype(np.int32)
        table.start[runs] = start
        table.count[runs] = counts
        table.digest[runs] = arrivals.digests()
        table.spec[runs] = spec
        table.append(rows, runs)
        sessions.accepted[rows] = start + counts
        sessions.num_pending_tokens[rows] = sessions.num_pending_tokens[rows] + counts.astype(np.int32)
        sessions.last_used[rows] = core.now
        core.num_pending_tokens += len(arrivals.tokens)
        core.go_on(served, rows)

    def _deadlines(self, arrivals: Arrivals) -> np.ndarray[tuple[int], np.dtype[np.float64]] | float:
        """By when each run must have begun: (n,), or one for all."""
        timeouts = arrivals.timeouts_seconds
        return np.inf if timeouts is None else np.where(timeouts > 0, self._core.now + timeouts, np.inf)


def _off_position(position: int, count: int, accepted: int) -> Refusal:
    """A run that begins ahead of its session, or overlaps in part what has run there."""
    if position > accepted:
        reason = ErrorReason.ERROR_REASON_POSITION_GAP
        message = f"the run is for position {position}, the session stands at {accepted}"
    else:
        reason = ErrorReason.ERROR_REASON_POSITION_CONFLICT
        message = f"the run is for positions {position} to {position + count}, the session stands at {accepted}"
    return Refusal(reason, message, position=accepted, field="positions")
