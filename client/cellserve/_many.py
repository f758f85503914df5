"""Steps many sessions at once: columns from the caller go straight into frames, and columns come back."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from cellserve._attachment import Attachment
from cellserve._blocks import Block, ResultBuffer
from cellserve._conversation import Conversation
from cellserve._deadline import Timeout
from cellserve._hub import Hub
from cellserve._ledger import Ledger
from cellserve._outputs import OutputSpec, Wishes
from cellserve._results import StepManyResult
from cellserve._steps import step_in_turn
from cellserve._tokens import TokenColumn, VectorColumn
from cellserve.errors import CellserveError, StepManyFailed

if TYPE_CHECKING:
    from cellserve._model import ServedModel
    from cellserve._session import AsyncSession

__all__ = ["Group", "step_many"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """Sessions that are fit to be stepped together."""

    sessions: list[AsyncSession]
    attachments: list[Attachment]
    ledgers: list[Ledger]
    model: ServedModel

    @classmethod
    def of(cls, hub: Hub, sessions: Sequence[AsyncSession]) -> Group:
        """The group of these sessions; that of the last call where they are the same. Raises ValueError."""
        listed, last = list(sessions), hub.last_group
        if last is not None and last.sessions == listed:
            return last
        if not listed:
            raise ValueError("step_many needs at least one session")
        attachments = [session._attachment for session in listed]
        model = attachments[0].model
        if {attachment.model for attachment in attachments} != {model} or attachments[0].hub is not hub:
            raise ValueError("the sessions of one step_many are of one model, and of this client")
        if len(set(attachments)) != len(attachments):
            raise ValueError("a session stands more than once among the sessions of step_many")
        hub.last_group = cls(listed, attachments, [attachment.ledger for attachment in attachments], model)
        return hub.last_group


async def step_many(
    hub: Hub,
    sessions: Sequence[AsyncSession],
    tokens: object,
    counts: Sequence[int] | npt.NDArray[np.integer] | None,
    wishes: Wishes,
    timeout: Timeout,
) -> StepManyResult:
    """See AsyncClient.step_many."""
    group = Group.of(hub, sessions)
    attachments, model = group.attachments, group.model
    spec = model.output_spec(wishes)
    column = model.read_tokens(tokens)
    if isinstance(column, int):
        column = array("I", (column,))
    count_column = _read_counts(counts, len(attachments), len(column))
    deadline = asyncio.get_running_loop().time() + timeout.seconds
    many = _Many(group, column, count_column, spec, timeout, deadline)
    # A run longer than a frame or the server takes goes its own way: it is rare, and large enough to bear the
    # cost.
    is_long = count_column > model.max_run_tokens(spec)
    if is_long.any():
        long_steps = [many.step_long(index) for index in np.flatnonzero(is_long).tolist()]
        await asyncio.gather(many.step_short(np.flatnonzero(~is_long)), *long_steps)
    else:
        await many.step_short(np.arange(len(attachments)))
    failures = dict(sorted(many.failures.items()))
    result = many.buffer.finish(list(failures))
    if failures:
        raise StepManyFailed(failures, result)
    return result


class _Many:
    """One step_many under way. failures: by index of the session."""

    def __init__(
        self,
        group: Group,
        column: TokenColumn | VectorColumn,
        counts: npt.NDArray[np.int64],
        spec: OutputSpec,
        timeout: Timeout,
        deadline: float,
    ) -> None:
        self.buffer = ResultBuffer(counts, spec)
        self.failures: dict[int, CellserveError] = {}
        self._attachments = group.attachments
        self._ledgers = group.ledgers
        self._column = column
        self._counts = counts
        self._token_starts = np.concatenate([[0], np.cumsum(counts)])
        self._spec = spec
        self._timeout = timeout
        self._deadline = deadline

    async def step_short(self, members: npt.NDArray[np.int64]) -> None:
        """Steps the sessions with these indices by one run each, in as few commands as possible."""
        while True:
            waiting = self._not_ready(members)
            if not waiting:
                break
            await asyncio.gather(*(self._make_ready(index) for index in waiting))
            members = members[[index not in self.failures for index in members.tolist()]]
        blocks: list[tuple[Conversation, Block]] = []
        conversations = {attachment.conversation for attachment in self._of(self._attachments, members)}
        for conversation in conversations:  # more than one only while sessions move from stream to stream
            assert conversation is not None
            rows = members
            if len(conversations) > 1:
                rows = members[[self._attachments[index].conversation is conversation for index in members.tolist()]]
            blocks.append((conversation, self._send(conversation, rows)))
        try:
            for _, block in blocks:
                await block.answer
        except BaseException:
            for conversation, block in blocks:
                if block.answer.cancel() or block.answer.cancelled():
                    conversation.give_up_block(block)
            raise
        for _, block in blocks:
            self.failures.update(block.failures)

    async def step_long(self, index: int) -> None:
        """Steps one session by more than one run can hold."""
        column = self._column[self._token_starts[index] : self._token_starts[index + 1]]
        try:
            result = await step_in_turn(
                self._attachments[index], self._spec, column, len(column), self._timeout, self._deadline
            )
        except CellserveError as error:
            self.failures[index] = error
        else:
            self.buffer.put_result(index, result)

    def _not_ready(self, members: npt.NDArray[np.int64]) -> list[int]:
        """Those of the sessions that cannot be stepped yet."""
        has_room, spec = self._attachments[0].model.has_room, self._spec
        ledgers = self._of(self._ledgers, members)
        return [
            index
            for index, ledger, count in zip(members.tolist(), ledgers, self._counts[members].tolist(), strict=True)
            if not ledger.ready
            or ledger.next_position + count > ledger.kept_limit
            or (ledger.num_unanswered and not has_room(ledger, spec, count))
        ]

    def _of(self, all_of: list[T], members: npt.NDArray[np.int64]) -> list[T]:
        return all_of if len(members) == len(all_of) else [all_of[index] for index in members.tolist()]

    async def _make_ready(self, index: int) -> None:
        attachment = self._attachments[index]
        try:
            async with attachment.turn("step_many", self._deadline):
                await attachment.until_ready(self._spec, int(self._counts[index]), self._deadline)
        except CellserveError as error:
            self.failures[index] = error

    def _send(self, conversation: Conversation, members: npt.NDArray[np.int64]) -> Block:
        tokens, vectors = None, None
        if isinstance(self._column, np.ndarray):
            vectors = self._column
        else:
            tokens = np.asarray(self._column)
        counts = self._counts
        if len(members) != len(counts):
            is_member = np.zeros(len(counts), dtype=np.bool_)
            is_member[members] = True
            is_token = np.repeat(is_member, counts)
            tokens = None if tokens is None else tokens[is_token]
            vectors = None if vectors is None else vectors[is_token]
            counts = counts[members]
        return conversation.send_block(
            self._of(self._ledgers, members),
            members,
            self._spec,
            tokens,
            vectors,
            counts,
            self._timeout,
            self._deadline,
            self.buffer,
        )


def _read_counts(
    counts: Sequence[int] | npt.NDArray[np.integer] | None, num_sessions: int, num_tokens: int
) -> npt.NDArray[np.int64]:
    if counts is None:
        if num_tokens != num_sessions:
            raise ValueError(f"{num_sessions} sessions need a token each, or counts; there are {num_tokens} tokens")
        return np.ones(num_sessions, dtype=np.int64)
    column = np.asarray(counts)
    if column.dtype.kind not in "iu":
        raise TypeError(f"counts are integers, not {column.dtype}")
    if column.shape != (num_sessions,) or (column < 0).any() or int(column.sum()) != num_tokens:
        raise ValueError(f"counts are {num_sessions} numbers that add up to the {num_tokens} tokens")
    return column.astype(np.int64)
