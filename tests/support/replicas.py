"""Servers with a state store, and what a client has over each: both may end at any moment, and begin anew."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, TypeAlias

from cellserve.v1 import session_service_pb2 as pb
from cellserve.v1.values_pb2 import SessionState
from tests.support.server import ServerProcess
from tests.support.stream import Opened, RawStream
from tests.support.wire import Follower, Wire

__all__ = ["MODEL", "Replica", "StartReplica"]

MODEL = "tiny-gru"


class Replica:
    """A server process, a connection to it, and a stream."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.wire: Wire
        self.stream: RawStream

    def start(self, **settings: str | int | float | bool) -> Replica:
        """Start the server, perhaps again and with other settings, and connect."""
        self.server.settings |= settings
        self.server.start()
        self.wire = Wire(self.server)
        self.stream = self.wire.stream()
        return self

    def kill(self) -> None:
        """End the server as a crash would."""
        if self.server.process is not None and self.server.process.poll() is None:
            self.server.kill()
        self.wire.disconnect()

    def crash(self, **settings: str | int | float | bool) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start(**settings)

    def stop(self) -> int:
        """Let it drain; returns the exit status."""
        status = self.server.stop()
        self.wire.disconnect()
        return status

    def pause(self) -> None:
        """Let the process stand still: for others it is as good as dead."""
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.server.process is not None
        self.server.process.send_signal(signal.SIGCONT)

    def session(self, session_id: str | None = None, durability: str = "SYNC", **more: Any) -> Follower:
        """A new session on the stream, followed by the oracle."""
        return Follower(self.wire, self.stream, MODEL, session_id=session_id, durability=durability, **more)

    def attach(self, session: Follower, mode: str = "ATTACH", **more: Any) -> Opened:
        """Attach a session here; it must be where its follower has it."""
        session.wire, session.stream = self.wire, self.stream
        opened = self.stream.open(session.model, session.id, mode, **more)
        assert (opened.created, opened.position) == (False, session.position)
        session.attach(opened)
        return opened

    def attach_by_id(self, session_id: str) -> Opened:
        """Attach a session that nobody follows."""
        return self.stream.open(MODEL, session_id, "ATTACH")

    def get(self, session_id: str) -> pb.Session:
        return self.wire.sessions.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=30).session

    def reset(self, session_id: str, **more: Any) -> pb.ResetSessionResponse:
        return self.wire.sessions.ResetSession(pb.ResetSessionRequest(session_id=session_id, **more), timeout=30)

    def fork(self, session_id: str, fork_id: str = "", **more: Any) -> pb.ForkSessionResponse:
        request = pb.ForkSessionRequest(session_id=session_id, fork_session_id=fork_id, **more)
        return self.wire.sessions.ForkSession(request, timeout=30)

    def close(self, session_id: str, **more: Any) -> pb.CloseSessionResponse:
        return self.wire.sessions.CloseSession(pb.CloseSessionRequest(session_id=session_id, **more), timeout=30)

    def import_state(self, session_id: str, state: SessionState, **more: Any) -> pb.ImportSessionResponse:
        request = pb.ImportSessionRequest(session_id=session_id, state=state, **more)
        return self.wire.sessions.ImportSession(request, timeout=30)

    def checkpoint(self, session_id: str, name: str, **more: Any) -> pb.CheckpointSessionResponse:
        request = pb.CheckpointSessionRequest(session_id=session_id, name=name, **more)
        return self.wire.sessions.CheckpointSession(request, timeout=30)

    def rollback(self, session_id: str, name: str, **more: Any) -> pb.RollbackSessionResponse:
        request = pb.RollbackSessionRequest(session_id=session_id, name=name, **more)
        return self.wire.sessions.RollbackSession(request, timeout=30)

    def quiet_state(self, tokens: Any) -> SessionState:
        """The state of a session that has met with nothing but these tokens."""
        opened = self.stream.open(MODEL, durability="NONE")
        for first in range(0, len(tokens), 4096):
            self.stream.step(opened.handle, tokens[first : first + 4096])
        state = self.wire.state(opened.session_id)
        self.stream.done(self.stream.close_session(opened.handle))
        return state

    def check_exactly(self, session: Follower) -> None:
        """The session's state is that of an undisturbed one to the last bit."""
        assert self.wire.state(session.id) == self.quiet_state(session.tokens)


# Starts one with settings.
StartReplica: TypeAlias = Callable[..., Replica]
