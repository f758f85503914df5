"""Sessions of the scripted server: the contract's rules, over a state that is the list of consumed tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from cellserve.v1.errors_pb2 import ErrorReason
from cellserve.v1.stream_pb2 import Durability, OpenMode

VOCABULARY = 65536
_MODULUS = 65521


def digest(tokens: Sequence[int]) -> int:
    """The state after these tokens, as one number: what the scripted model says comes next."""
    value = 7
    for token in tokens:
        value = (31 * value + token + 1) % _MODULUS
    return value


def digests(tokens: Sequence[int], begin: int = 0) -> list[int]:
    """The scripted model's answers to the tokens from position begin on."""
    return [digest(tokens[: end + 1]) for end in range(begin, len(tokens))]


def sampled(seed: int, tokens: Sequence[int]) -> int:
    """What the scripted model samples after these tokens."""
    return (digest(tokens) + seed) % 256


class RefusedError(Exception):
    """A request is refused, with a reason of the contract."""

    def __init__(self, reason: str, position: int = 0) -> None:
        super().__init__(reason)
        self.reason = ErrorReason.Value(f"ERROR_REASON_{reason}")
        self.name = reason
        self.position = position


@dataclass
class Held:
    """An answer that is held: of the run of these tokens at this position, for these outputs."""

    position: int
    tokens: list[int]
    outputs: bytes


@dataclass
class Row:
    """A session as the store has it."""

    tokens: list[int] = field(default_factory=list)
    epoch: int = 1
    holder: int = 0
    held: list[Held] = field(default_factory=list)
    marks: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Session:
    """A session in a server's memory. handle: while a stream holds it."""

    id: str
    row: Row
    durability: int
    durable_position: int = 0
    stream: object | None = None
    handle: int = 0
    is_generating: bool = False

    @property
    def position(self) -> int:
        return len(self.row.tokens)


class Store:
    """What outlives servers: rows, who owns them, why sessions ended, and the first answers to requests."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.owners: dict[str, object] = {}
        self.ended: dict[str, str] = {}
        self.answers: dict[str, object] = {}


class Sessions:
    """The sessions of one server process: gone when it dies, but for what the store has."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.resident: dict[str, Session] = {}
        self.runs: list[tuple[str, int, list[int]]] = []  # every run that has moved a state

    def find(self, session_id: str) -> Session:
        """The session, taken over from the store where this process does not have it."""
        store = self.store
        session = self.resident.get(session_id)
        if session is not None:
            if session.durability == Durability.DURABILITY_NONE or store.owners.get(session_id) is self:
                return session
            del self.resident[session_id]  # another process has taken it
        if session_id in store.ended:
            raise RefusedError(store.ended[session_id])
        if session_id not in store.rows:
            raise RefusedError("SESSION_NOT_FOUND")
        row = copy.deepcopy(store.rows[session_id])
        session = Session(session_id, row, Durability.DURABILITY_PERIODIC, len(row.tokens))
        self.resident[session_id] = session
        store.owners[session_id] = self
        self.raise_epoch(session)
        return session

    def open(self, session_id: str, mode: int, durability: int, holder: int) -> tuple[Session, bool]:
        """Creates or attaches; returns whether it was created."""
        try:
            session = self.find(session_id)
        except RefusedError:
            if mode in (OpenMode.OPEN_MODE_ATTACH, OpenMode.OPEN_MODE_RESUME):
                raise
            self.store.ended.pop(session_id, None)
            session = Session(session_id, Row(holder=holder), durability or Durability.DURABILITY_PERIODIC)
            self.resident[session_id] = session
            self.save(session)
            return session, True
        if mode == OpenMode.OPEN_MODE_CREATE:
            raise RefusedError("SESSION_EXISTS")
        if mode == OpenMode.OPEN_MODE_RESUME and session.row.holder != holder:
            raise RefusedError("SESSION_MOVED")
        session.row.holder = holder
        self.raise_epoch(session)
        return session, False

    def run(self, session: Session, position: int, tokens: list[int], outputs: bytes) -> list[int]:
        """The answers to a run, by the rule of the contract."""
        stands, end = session.position, position + len(tokens)
        if session.is_generating:
            raise RefusedError("SESSION_BUSY")
        if stands < position:
            raise RefusedError("POSITION_GAP", stands)
        if stands >= end:
            for held in session.row.held:
                if held.position == position and len(held.tokens) == len(tokens):
                    if held.tokens != tokens:
                        raise RefusedError("POSITION_CONFLICT", stands)
                    if held.outputs == outputs:
                        return digests(session.row.tokens[:end], position)
            raise RefusedError("ANSWER_NOT_HELD", stands)
        if stands > position:
            raise RefusedError("POSITION_CONFLICT", stands)
        session.row.tokens += tokens
        session.row.held.append(Held(position, list(tokens), outputs))
        self.runs.append((session.id, position, list(tokens)))
        if session.durability == Durability.DURABILITY_SYNC:
            self.save(session)
        return digests(session.row.tokens, position)

    def acknowledge(self, session: Session, position: int) -> None:
        """Answers up to position need not be held."""
        session.row.held = [held for held in session.row.held if held.position + len(held.tokens) > position]

    def save(self, session: Session) -> None:
        """Writes the session to the store."""
        if session.durability != Durability.DURABILITY_NONE and self.store.owners.get(session.id, self) is self:
            self.store.rows[session.id] = copy.deepcopy(session.row)
            self.store.owners[session.id] = self
            session.durable_position = session.position

    def replace(self, session: Session, tokens: list[int], holder: int) -> None:
        """Sets the state, as a reset, an import or a rollback does."""
        session.row.tokens = list(tokens)
        session.row.held = []
        if holder != session.row.holder:
            session.row.holder = 0
        self.raise_epoch(session)
        self.save(session)

    def end(self, session: Session, reason: str) -> None:
        """The session is no more."""
        self.resident.pop(session.id, None)
        self.store.rows.pop(session.id, None)
        self.store.ended[session.id] = reason

    def raise_epoch(self, session: Session) -> None:
        """Whoever held the session holds it no longer."""
        session.row.epoch += 1
        stored = self.store.rows.get(session.id)
        if stored is not None:
            stored.epoch = max(stored.epoch, session.row.epoch)
            stored.holder = session.row.holder
