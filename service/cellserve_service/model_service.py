"""The servicer of ModelService: which models are served, and the server's limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import grpc

from cellserve.v1 import model_service_pb2 as pb
from cellserve.v1.errors_pb2 import ErrorReason
from cellserve_service.errors import Refusal, invalid
from cellserve_service.limits import EngineLimits
from cellserve_service.status import abort
from cellserve_service.stepping import ModelInfo

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ModelServicer:
    """Answers from what was loaded at the start."""

    def __init__(self, models: Sequence[pb.Model], limits: EngineLimits, *, max_message_bytes: int) -> None:
        self._models = {model.name: model for model in sorted(models, key=lambda model: model.name)}
        self._limits = pb.ServerLimits(
            max_run_tokens=limits.max_run_tokens,
            max_session_pending_tokens=limits.max_session_pending_tokens,
            max_message_bytes=max_message_bytes,
            max_answer_bytes=limits.max_answer_bytes,
            max_open_sessions=limits.max_open_sessions,
            max_held_answers=limits.max_held_answers,
            max_held_answer_bytes=limits.max_held_answer_bytes,
            max_checkpoints=limits.max_checkpoints,
        )

    async def list_models(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=self._models.values(), limits=self._limits)

    async def get_model(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        if not request.name:
            await abort(context, invalid("the model's name is missing", "name"))
        model = self._models.get(request.name)
        if model is None:
            names = ", ".join(self._models) or "none"
            message = f"no model {request.name!r} is served here; served: {names}"
            await abort(context, Refusal(ErrorReason.ERROR_REASON_MODEL_NOT_FOUND, message, field="name"))
        return pb.GetModelResponse(model=model, limits=self._limits)

    async def load_model(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server loads its models when it starts")
        raise AssertionError("abort does not return")

    async def unload_model(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server keeps its models until it stops")
        raise AssertionError("abort does not return")


def describe(info: ModelInfo) -> pb.Model:
    """A model as the contract tells of it."""
    model = pb.Model(
        name=info.name,
        version=info.version,
        cell=info.cell,
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        state_size=info.state_size,
        output_size=info.output_size,
        gate_names=info.gate_names,
        num_parameters=info.num_parameters,
        fingerprint=info.fingerprint,
        device=info.device,
    )
    if info.vocab_size is not None:
        model.tokens.vocab_size = info.vocab_size
    elif info.input_size is not None:
        model.vectors.input_size = info.input_size
    return model
