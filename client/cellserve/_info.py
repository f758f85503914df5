"""What a server tells about its models and sessions, as plain dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cellserve.v1.model_service_pb2 import Model
from cellserve.v1.model_service_pb2 import ServerLimits as ServerLimitsMessage
from cellserve.v1.session_service_pb2 import Session as SessionMessage
from cellserve.v1.session_service_pb2 import Tier
from cellserve.v1.stream_pb2 import Durability

__all__ = ["ModelInfo", "ServerLimits", "SessionInfo", "durability_name"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as it is served.

    state_size: numbers of state per layer (`lstm`: twice hidden_size). vocab_size is None for a model of
    vectors, input_size for a model of tokens, output_size for a model without a head. fingerprint: SHA-256,
    32 bytes.
    """

    name: str
    version: int
    cell: str
    num_layers: int
    hidden_size: int
    state_size: int
    vocab_size: int | None
    input_size: int | None
    output_size: int | None
    gate_names: tuple[str, ...]
    num_parameters: int
    fingerprint: bytes
    device: str

    @classmethod
    def from_message(cls, model: Model) -> ModelInfo:
        kind = model.WhichOneof("input")
        return cls(
            name=model.name,
            version=model.version,
            cell=model.cell,
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            state_size=model.state_size,
            vocab_size=model.tokens.vocab_size if kind == "tokens" else None,
            input_size=model.vectors.input_size if kind == "vectors" else None,
            output_size=model.output_size if model.HasField("output_size") else None,
            gate_names=tuple(model.gate_names),
            num_parameters=model.num_parameters,
            fingerprint=model.fingerprint,
            device=model.device,
        )


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """An open session as it stands.

    durability: "none", "periodic" or "sync". durable_position: None without a store. tier: "device", "host"
    or "store". attached: whether a stream holds it. idle_seconds: since its last run, open or attach.
    generating: whether a generate is under way. checkpoints: the marked positions by name, oldest first.
    """

    id: str
    model: str
    model_version: int
    position: int
    epoch: int
    num_pending_tokens: int
    durability: str
    durable_position: int | None
    tier: str
    attached: bool
    idle_seconds: float
    age_seconds: float
    generating: bool = False
    checkpoints: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_message(cls, session: SessionMessage) -> SessionInfo:
        return cls(
            id=session.id,
            model=session.model,
            model_version=session.model_version,
            position=session.position,
            epoch=session.epoch,
            num_pending_tokens=session.num_pending_tokens,
            durability=durability_name(session.durability),
            durable_position=session.durable_position if session.HasField("durable_position") else None,
            tier=Tier.Name(session.tier).removeprefix("TIER_").lower(),
            attached=session.attached,
            idle_seconds=session.idle_seconds,
            age_seconds=session.age_seconds,
            generating=session.generating,
            checkpoints={checkpoint.name: checkpoint.position for checkpoint in session.checkpoints},
        )


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits that a client stays inside; see ServerLimits in model_service.proto."""

    max_run_tokens: int
    max_session_pending_tokens: int
    max_message_bytes: int
    max_open_sessions: int
    max_held_answers: int
    max_held_answer_bytes: int

    @classmethod
    def from_message(cls, limits: ServerLimitsMessage) -> ServerLimits:
        return cls(
            max_run_tokens=limits.max_run_tokens,
            max_session_pending_tokens=limits.max_session_pending_tokens,
            max_message_bytes=limits.max_message_bytes,
            max_open_sessions=limits.max_open_sessions,
            max_held_answers=limits.max_held_answers,
            max_held_answer_bytes=limits.max_held_answer_bytes,
        )


def durability_name(durability: Durability.ValueType) -> str:
    """ "none", "periodic" or "sync"."""
    return Durability.Name(durability).removeprefix("DURABILITY_").lower()
