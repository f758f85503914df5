"""Advances many sessions at once on a GPU; nothing waits before a tick is collected.

A tick of one token a row replays the graph of its bucket, longer runs and ticks that ask for gates take the run
kernel, and generation replays the graph of one token as often as it has tokens. All go to the current stream in
the order in which they were submitted.
Symbols: B rows of a tick, N tokens, M hidden vectors that the head runs on, L layers, W padded hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cellserve_model.cuda.generation import CudaGeneration
from cellserve_model.cuda.graphs import Capture, Replay
from cellserve_model.cuda.network import CudaNetwork, RunOutputs, RunRows
from cellserve_model.cuda.outputs import OutputTensors, run_head
from cellserve_model.cuda.staging import (
    places_by_step,
    positions_of,
    tile_counts,
    upload,
    upload_columns,
    vectors_in_halves,
)
from cellserve_model.errors import ModelError
from cellserve_model.generation import GenerateRequest
from cellserve_model.plan import TickPlan, plan_tick
from cellserve_model.stepper import Ticket
from cellserve_model.ticks import GenerateResult, ModelInfo, StepResult

__all__ = ["CudaStepper"]

ResultT = TypeVar("ResultT", StepResult, GenerateResult)


class CudaStepper:
    """A `Stepper` whose states are on a GPU.

    capture: makes a replay of a launch, `cuda_capture`. max_batch: the most rows of a tick.
    """

    def __init__(self, info: ModelInfo, network: CudaNetwork, max_batch: int, capture: Capture) -> None:
        self.info = info
        self.num_slots = network.slab.num_slots
        self.max_batch = max_batch
        self.efficient_batch = max_batch  # the weights are read once, for few rows as for many
        self._network, self._slab, self._device = network, network.slab, network.device
        self._capture = capture
        self._steps: dict[int, Replay] = {}
        self._heads: dict[int, Replay] = {}
        self._generation: CudaGeneration | None = None
        if info.vocab_size is not None and info.vocab_size == info.output_size:
            self._generation = CudaGeneration(network, capture)

    def submit(
        self,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        wants: NDArray[np.uint8],
        top_k: int,
    ) -> Ticket[StepResult]:
        """Advance each slot by its tokens; see CpuStepper.submit."""
        self._check_rows(slots)
        if len(tokens) != len(wants):
            raise ValueError(f"{len(tokens)} tokens and {len(wants)} wants; there is one want for each token")
        plan = plan_tick(counts, wants)
        with torch.inference_mode():
            started = self._record_event()
            is_plain = len(plan.step_sizes) == 1 and plan.gates is None
            advance = self._step if is_plain else self._run
            num_padding_rows, outputs = advance(plan, slots, counts, tokens, top_k)
            on_host = outputs.to_host()
            return self._ticket(
                started, lambda seconds: on_host.result(self.info, plan.head, num_padding_rows, seconds)
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
        """Sample tokens for each slot, each of them consumed; see CpuStepper.submit_generate."""
        self._check_rows(slots)
        if self._generation is None:
            raise ModelError(
                f"{self.info.name} cannot generate: it needs token input and one output for each token "
                f"(vocab_size {self.info.vocab_size}, output_size {self.info.output_size})"
            )
        request = GenerateRequest(num_tokens, positions, seeds, temperatures, top_ks, top_ps, stop_tokens)
        with torch.inference_mode():
            started = self._record_event()
            on_host = self._generation.run(slots, request).to_host()
            num_padding_rows = int(num_tokens.max()) * (self._network.bucket(len(slots)) - len(slots))
            return self._ticket(started, lambda seconds: on_host.result(num_padding_rows, seconds))

    def collect(self, ticket: Ticket[ResultT]) -> ResultT:
        """Wait for a tick and return its outputs."""
        if ticket.started is None or ticket.ended is None:
            return ticket.finish(ticket.seconds)
        ticket.ended.synchronize()
        return ticket.finish(ticket.started.elapsed_time(ticket.ended) / 1000)

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
        """Compile the kernels and capture the graphs of every bucket, on the scratch row, so that no session waits."""
        network, head = self._network, self._network.head
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            for bucket in self._buckets(self.max_batch):
                if bucket not in self._steps:
                    network.step.columns(bucket).zero_()
                    self._steps[bucket] = self._capture(functools.partial(network.launch_step, bucket))
                self._run_scratch(bucket)
            for bucket in self._buckets(0 if head is None else head.max_rows):
                if head is not None and bucket not in self._heads:
                    head.columns(bucket).zero_()
                    self._heads[bucket] = self._capture(
                        functools.partial(network.launch_head, *head.columns(bucket).unbind(0))
                    )
            if self._generation is not None:
                self._generation.warm_up(self._buckets(self.max_batch))
            self._slab.bits[0].zero_()

    def close(self) -> None:
        """Let go of the slab, the weights and the graphs; the stepper is of no use afterwards."""
        self._steps, self._heads, self._generation = {}, {}, None
        del self._network, self._slab
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(
        self,
        plan: TickPlan,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        top_k: int,
    ) -> tuple[int, OutputTensors]:
        """One token for every row. Returns the number of padding rows and the outputs."""
        network, num_rows = self._network, len(slots)
        bucket = network.bucket(num_rows)
        sources, targets = self._slab.rows(slots), self._slab.take_spares(num_rows)
        ids, vectors = self._split_input(tokens)
        upload_columns(network.step.columns(bucket), (sources, targets, ids))
        if len(vectors):
            network.step.inputs[:bucket].copy_(vectors_in_halves(vectors, bucket, network.inner, self._device))
        self._steps.get(bucket, functools.partial(network.launch_step, bucket))()
        self._slab.move(slots, targets, sources)
        outputs = OutputTensors()
        if plan.head is not None:
            rows = np.zeros(plan.head.num_moments, dtype=np.int64)
            # The state before the token still stands where the step has read it.
            for capture, held in zip(plan.head.captures, (sources, targets), strict=True):
                if capture is not None:
                    rows[capture.places] = held if capture.ranks is None else held[capture.ranks]
            outputs = run_head(network, self._heads, plan.head, rows, None, tokens, top_k)
        asked = None if plan.states is None else plan.states.captures[1]
        if asked is not None:
            outputs.states = self._slab.gather(targets if asked.ranks is None else targets[asked.ranks])
        return bucket - num_rows, outputs

    def _run(
        self,
        plan: TickPlan,
        slots: NDArray[np.int64],
        counts: NDArray[np.int64],
        tokens: NDArray[np.uint32] | NDArray[np.float32],
        top_k: int,
    ) -> tuple[int, OutputTensors]:
        """Any number of tokens for each row, and any outputs."""
        network, device, config = self._network, self._device, self._network.config
        starts = np.cumsum(counts) - counts
        if plan.order is not None:
            slots, counts, starts = slots[plan.order], counts[plan.order], starts[plan.order]
        bucket = network.bucket(len(slots))
        tile_rows = network.cell_tile(bucket).rows
        sources, targets = self._slab.rows(slots), self._slab.take_spares(len(slots))
        columns = torch.empty(4, bucket, dtype=torch.int32, device=device)
        upload_columns(columns, (sources, targets, starts, counts))
        row_tiles = -(-np.array(plan.step_sizes) // tile_rows)
        ids, vectors = self._split_input(tokens)
        hidden_places, state_places, gate_places = (
            upload(places_by_step(asked, plan.step_sizes, bucket), device)
            for asked in (plan.head, plan.states, plan.gates)
        )
        outputs = RunOutputs(
            hidden=torch.zeros(
                0 if plan.head is None else plan.head.num_moments, 2, network.width, dtype=torch.int16, device=device
            ),
            states=torch.empty(
                0 if plan.states is None else plan.states.num_tokens,
                config.num_layers,
                config.spec.state_vectors,
                network.width,
                device=device,
            ),
            gates=torch.empty(
                0 if plan.gates is None else plan.gates.num_tokens,
                len(config.spec.gate_names),
                config.num_layers,
                network.width,
                device=device,
            ),
        )
        before = None if plan.head is None else plan.head.captures[0]
        if before is not None:
            held = upload(sources if before.ranks is None else sources[before.ranks], device)
            places = upload(positions_of(before), device)
            outputs.hidden.index_copy_(0, places.long(), self._slab.bits[:, -1, 0].index_select(0, held))
        rows = RunRows(
            sources=columns[0],
            targets=columns[1],
            starts=columns[2],
            counts=columns[3],
            row_tiles=upload(row_tiles, device),
            tokens=upload(ids, device),
            inputs=vectors_in_halves(vectors, len(vectors), network.inner, device),
            hidden_places=hidden_places,
            state_places=state_places,
            gate_places=gate_places,
        )
        network.launch_run(rows, outputs)
        is_odd = tile_counts(counts, tile_rows) % 2 == 1
        self._slab.move(slots, np.where(is_odd, targets, sources), np.where(is_odd, sources, targets))
        found = OutputTensors()
        if plan.head is not None:
            everything = np.arange(plan.head.num_moments)
            found = run_head(network, self._heads, plan.head, everything, outputs.hidden, tokens, top_k)
        if plan.states is not None:
            found.states = outputs.states[..., : config.hidden_size].flatten(2)
        if plan.gates is not None:
            found.gates = outputs.gates[..., : config.hidden_size].contiguous()
        return int((row_tiles * tile_rows - plan.step_sizes).sum()), found

    def _split_input(
        self, tokens: NDArray[np.uint32] | NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ids and the vectors (., I) of a tick; there are only ever one of them."""
        if self.info.input_size is None:
            return tokens.astype(np.int64), np.empty((0, 0), np.float32)
        return np.empty(0, np.int64), np.asarray(tokens, dtype=np.float32)

    def _run_scratch(self, bucket: int) -> None:
        """Compile the run kernel of a bucket by two steps of the scratch row."""
        size, tile_rows = self._network.config.input_size, self._network.cell_tile(bucket).rows
        zeros = torch.zeros(bucket, dtype=torch.int32, device=self._device)
        nowhere = torch.full((2, bucket), -1, dtype=torch.int32, device=self._device)
        nothing = torch.empty(0, 2, self._network.width, dtype=torch.int16, device=self._device)
        rows = RunRows(
            sources=zeros,
            targets=zeros,
            starts=zeros,
            counts=zeros,
            row_tiles=torch.full((2,), bucket // tile_rows, dtype=torch.int32, device=self._device),
            tokens=zeros[:1],
            inputs=vectors_in_halves(np.zeros((1, size or 0), np.float32), 1, self._network.inner, self._device),
            hidden_places=nowhere,
            state_places=nowhere,
            gate_places=nowhere,
        )
        self._network.launch_run(rows, RunOutputs(hidden=nothing, states=nothing.float(), gates=nothing.float()))

    def _buckets(self, max_rows: int) -> list[int]:
        """Every bucket that up to `max_rows` rows can take, the largest first: the others fit into its memory."""
        sizes = {self._network.bucket(2**power) for power in range(max_rows.bit_length())}
        return sorted(sizes | {self._network.bucket(max_rows)}, reverse=True) if max_rows else []

    def _record_event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        torch.cuda.set_device(self._device)  # events and graphs go to the current device, which is the thread's own
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _ticket(self, started: torch.cuda.Event | None, finish: Callable[[float], ResultT]) -> Ticket[ResultT]:
        return Ticket(finish, 0.0, started, self._record_event())

    def _check_rows(self, slots: NDArray[np.int64]) -> None:
        if not 1 <= len(slots) <= self.max_batch:
            raise ValueError(f"a tick of {len(slots)} rows; it has 1 to {self.max_batch}")
