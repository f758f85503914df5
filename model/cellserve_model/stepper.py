"""Advances many sessions at once on a CPU: gathers their states from the slab, steps them, puts them back.

Symbols: B rows of a tick, N tokens of a tick, I input size, L layers, O output size, Q stop tokens.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cellserve_model.errors import ModelError
from cellserve_model.generation import GenerateRequest, generate
from cellserve_model.outputs import OutputTensors, Recorder
from cellserve_model.plan import TickPlan, plan_tick
from cellserve_model.slab import Slab, to_tensor
from cellserve_model.ticks import GenerateResult, ModelInfo, StepResult
from cellserve_model.workspace import SteppingNetwork

__all__ = ["CpuStepper", "Ticket"]

ResultT = TypeVar("ResultT", StepResult, GenerateResult)

# What a tick costs beside its products is a tenth by then.
_EFFICIENT_BATCH = 128


@dataclass(frozen=True, slots=True)
class Ticket(Generic[ResultT]):
    """A tick under way; hand it to `collect` of its stepper once.

    finish: makes the result, given the seconds of computing, once the tick has ended. ended: None where it
    has.
    """

    finish: Callable[[float], ResultT]
    seconds: float
    started: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None


class CpuStepper:
    """A loaded model with the states of its sessions; all calls come from one thread.

    Slots 1 to num_slots hold states; slot 0 is scratch. max_batch: the most rows of a tick. num_threads: of
    torch on a CPU, None leaves them as they are. `load_stepper` makes one from a model directory.
    """

    def __init__(self, info: ModelInfo, network: SteppingNetwork, slab: Slab, *, num_threads: int | None) -> None:
        self.info = info
        self.num_slots = slab.num_slots
        self.max_batch = network.max_rows
        self.efficient_batch = min(self.max_batch, _EFFICIENT_BATCH)
        self._num_threads = num_threads
        self._network = network
        self._slab = slab

    def submit(
        self,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        wants: NDArray[np.uint8],
        top_k: int,
    ) -> Ticket[StepResult]:
        """Advance each slot by its tokens.

        slots: (B,) int64, unique, none 0, B <= max_batch. counts: (B,) int64, tokens of each row, at least 1.
        tokens: (N,) uint32 ids or (N, I) float32, row after row. wants: (N,) uint8, bits of Want for each
        token. top_k: how many likeliest tokens a row of TOP_K gets. The values are trusted; raises ValueError
        where the shapes disagree.
        """
        self._check_rows(slots)
        if len(tokens) != len(wants):
            raise ValueError(f"{len(tokens)} tokens and {len(wants)} wants; there is one want for each token")
        plan = plan_tick(counts, wants)
        with torch.inference_mode():
            started = time.perf_counter()
            num_padding_rows, outputs = self._step(plan, slots, tokens, top_k)
            return Ticket(
                lambda seconds: self._result(outputs, num_padding_rows, seconds), time.perf_counter() - started
            )

    def submit_generate(
        self,
        slots: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        temperatures: NDArray[np.float32],
        top_ks: NDArray[np.int64],
        top_ps: NDArray[np.float32],
        stop_tokens: NDArray[np.int64],
    ) -> Ticket[GenerateResult]:
        """Sample tokens for each slot, each of them consumed: so many that num_tokens says, (B,) int64, at least 1.

        positions: (B,) int64, tokens consumed so far. seeds: (B,) uint64. temperatures: (B,) float32, 0 takes
        the likeliest. top_ks: (B,) int64, 0 is off. top_ps: (B,) float32, 1 is off. stop_tokens: (B, Q)
        int64, padded with -1: a row that has consumed one of its own moves no further. Raises ModelError
        where the model cannot generate.
        """
        self._check_rows(slots)
        if self.info.vocab_size is None or self.info.vocab_size != self.info.output_size:
            raise ModelError(
                f"{self.info.name} cannot generate: it needs token input and one output for each token "
                f"(vocab_size {self.info.vocab_size}, output_size {self.info.output_size})"
            )
        request = GenerateRequest(num_tokens, positions, seeds, temperatures, top_ks, top_ps, stop_tokens)
        with torch.inference_mode():
            started = time.perf_counter()
            views, rows = self._network.views(len(slots)), to_tensor(slots)
            self._slab.gather(rows, views.states)
            outputs = generate(self._network, views, request)
            self._slab.scatter(rows, views.states)
            num_padding_rows = int(num_tokens.max()) * (self._network.padded_rows(len(slots)) - len(slots))
            return Ticket(lambda seconds: outputs.result(num_padding_rows, seconds), time.perf_counter() - started)

    def collect(self, ticket: Ticket[ResultT]) -> ResultT:
        """Return the outputs of a tick, which has ended when it is submitted."""
        return ticket.finish(ticket.seconds)

    def read_rows(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copy states out: (B, L, state_size) float32."""
        with torch.inference_mode():
            return self._slab.read(slots)

    def write_rows(self, slots: NDArray[np.int64], rows: NDArray[np.float32]) -> None:
        """Overwrite states. rows: (B, L, state_size) float32."""
        with torch.inference_mode():
            self._slab.write(slots, rows)

    def zero_rows(self, slots: NDArray[np.int64]) -> None:
        """Put slots at position 0."""
        with torch.inference_mode():
            self._slab.zero(slots)

    def copy_rows(self, source_slots: NDArray[np.int64], target_slots: NDArray[np.int64]) -> None:
        """Copy states from slot to slot; every source is read before any target is written."""
        with torch.inference_mode():
            self._slab.copy(source_slots, target_slots)

    def warm_up(self) -> None:
        """Run a tick once on the scratch slot, so that no session waits."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            for num_rows in {1, self.efficient_batch}:
                views = self._network.views(num_rows)
                shape = (num_rows,) if self.info.input_size is None else (num_rows, self.info.input_size)
                dtype = torch.int64 if self.info.input_size is None else torch.float32
                self._network.advance(views, torch.zeros(shape, dtype=dtype))
                if self.info.output_size is not None:
                    self._network.head(views.padded_top_hidden).argmax(1)
            self._slab.rows[0].zero_()

    def close(self) -> None:
        """Let go of the slab and the weights; the stepper is of no use afterwards."""
        del self._network, self._slab

    def _step(
        self,
        plan: TickPlan,
        slots: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        top_k: int,
    ) -> tuple[int, OutputTensors]:
        network = self._network
        is_tokens = self.info.vocab_size is not None
        observed = to_tensor(tokens.astype(np.int64)) if is_tokens else None
        if plan.token_order is None:
            inputs = observed if observed is not None else to_tensor(tokens)
        elif observed is not None:
            inputs = observed.index_select(0, to_tensor(plan.token_order))
        else:
            inputs = to_tensor(tokens[plan.token_order])
        rows = to_tensor(slots if plan.order is None else slots[plan.order])
        recorder = Recorder(network, plan)
        num_padding_rows = self._run_steps(plan, rows, inputs, recorder)
        return num_padding_rows, recorder.finish(observed, top_k)

    def _run_steps(self, plan: TickPlan, slots: Tensor, inputs: Tensor, recorder: Recorder) -> int:
        """Gather, step after step, scatter. slots: (B,) int64, longest runs first. Returns the rows of padding."""
        network, slab = self._network, self._slab
        views = network.views(len(slots))
        slab.gather(slots, views.states)
        recorder.before(views)
        # Vectors of many steps go through one product: for few rows it takes as long as for one step's.
        is_projected = self.info.input_size is not None and len(plan.step_sizes) > 1
        parts: Iterable[Tensor] = (inputs,)
        if is_projected:
            parts = network.project(inputs, plan.step_sizes)
        elif len(plan.step_sizes) > 1:
            parts = torch.split(inputs, plan.step_sizes)
        num_padding_rows = 0
        for step, (size, given) in enumerate(zip(plan.step_sizes, parts, strict=True), start=1):
            part = network.views(size)
            after_layer = None if plan.gates is None else functools.partial(recorder.after_layer, step)
            network.advance(part, given, after_layer, is_projected=is_projected)
            recorder.after(step, part)
            num_padding_rows += network.padded_rows(size) - size
        slab.scatter(slots, views.states)
        return num_padding_rows

    def _result(self, outputs: OutputTensors, num_padding_rows: int, seconds: float) -> StepResult:
        info = self.info
        return StepResult(
            next_tokens=_ids(outputs.next_tokens, 0),
            top_tokens=_ids(outputs.top_tokens, 0, 0),
            top_logprobs=_floats(outputs.top_logprobs, 0, 0),
            logprobs=_floats(outputs.logprobs, 0),
            logits=_floats(outputs.logits, 0, info.output_size or 0),
            states=_floats(outputs.states, 0, info.num_layers, info.state_size),
            gates=_floats(outputs.gates, 0, len(info.gate_names), info.num_layers, info.hidden_size),
            num_padding_rows=num_padding_rows,
            compute_seconds=seconds,
        )

    def _check_rows(self, slots: NDArray[np.int64]) -> None:
        if not 1 <= len(slots) <= self.max_batch:
            raise ValueError(f"a tick of {len(slots)} rows; it has 1 to {self.max_batch}")


def _ids(tensor: Tensor | None, *empty_shape: int) -> NDArray[np.uint32]:
    return _no_ids(empty_shape) if tensor is None else tensor.numpy().astype(np.uint32)


def _floats(tensor: Tensor | None, *empty_shape: int) -> NDArray[np.float32]:
    return _no_floats(empty_shape) if tensor is None else tensor.numpy()


# Nothing can be written to an array without numbers, so all results share one of each shape.
@functools.lru_cache
def _no_ids(shape: tuple[int, ...]) -> NDArray[np.uint32]:
    return np.empty(shape, np.uint32)


@functools.lru_cache
def _no_floats(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.empty(shape, np.float32)
