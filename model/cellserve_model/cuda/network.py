"""Launches the kernels of a network over one set of buffers, whose addresses a captured graph can keep.

Symbols: B rows of a tick, B' rows of a bucket, L layers, G row blocks, W padded hidden size, I' padded input
size, M hidden vectors that the head runs on, O' padded outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellserve_model.config import ModelConfig
from cellserve_model.cuda.head_kernels import logits_kernel, read_off_kernel
from cellserve_model.cuda.kernels import candidate_kernel, gates_kernel, one_product_kernel
from cellserve_model.cuda.run_kernel import run_kernel
from cellserve_model.cuda.slab import CudaSlab
from cellserve_model.cuda.tiles import DETERMINISTIC_ROWS, MIN_ROWS, Tile, choose_tile, padded_width, tile_depth
from cellserve_model.cuda.weights import CudaWeights

__all__ = ["CudaNetwork", "HeadBuffers", "RunOutputs", "RunRows", "StepBuffers"]

_MAX_LOGITS_AT_ONCE = 16 * 2**20  # bounds what the head of a large vocabulary takes: 64 MiB of float32
_READ_OFF_BLOCK = 1024
_DEFAULT_MULTIPROCESSORS = 132  # of the chips that the rule in tiles.py was written for


class StepBuffers:
    """What a step is told. inputs: (B', 2, I') int16, vectors in halves, which take the place of the tokens."""

    def __init__(self, config: ModelConfig, max_rows: int, device: torch.device) -> None:
        self._columns = torch.zeros(3 * max_rows, dtype=torch.int32, device=device)
        width = 0 if config.input_size is None else padded_width(config.input_size)
        self.inputs = torch.zeros(max_rows, 2, width, dtype=torch.int16, device=device)

    def columns(self, num_rows: int) -> Tensor:
        """(3, B') int32, contiguous: for each row of a bucket the row of the slab to read, the one to write, the token.

        Rows behind the batch must be zero.
        """
        return self._columns[: 3 * num_rows].view(3, num_rows)


class HeadBuffers:
    """What the head is told and what it gives, for at most `max_rows` hidden vectors."""

    def __init__(self, num_outputs: int, max_rows: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self._columns = torch.zeros(2 * max_rows, dtype=torch.int32, device=device)
        self.logits = torch.zeros(max_rows, num_outputs, device=device)
        self.likeliest = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.totals = torch.zeros(max_rows, device=device)
        self.logprobs = torch.zeros(max_rows, device=device)

    def columns(self, num_rows: int) -> Tensor:
        """(2, M) int32, contiguous: the row in which each vector stands, the token whose log-probability is read."""
        return self._columns[: 2 * num_rows].view(2, num_rows)


@dataclass(frozen=True, slots=True)
class RunRows:
    """What a run is told: B' rows, longest run first, of T steps and N tokens in all; int32 on the device.

    sources, targets: (B',), the two rows of the slab of each session; behind the batch zero, as starts and
    counts. starts, counts: (B',), first token and number of tokens. row_tiles: (T,), tiles of rows of a step.
    tokens: (N,). inputs: (N, 2, I') int16. The places (T, B') say where to put what is asked for after a step.
    """

    sources: Tensor
    targets: Tensor
    starts: Tensor
    counts: Tensor
    row_tiles: Tensor
    tokens: Tensor
    inputs: Tensor
    hidden_places: Tensor
    state_places: Tensor
    gate_places: Tensor


@dataclass(frozen=True, slots=True)
class RunOutputs:
    """What is asked for in a run, empty where nothing is.

    hidden: (M, 2, W) int16, the top layer's h_t in halves. states: (n, L, vectors, W) float32. gates: (n, gates,
    L, W) float32.
    """

    hidden: Tensor
    states: Tensor
    gates: Tensor


class CudaNetwork:
    """A network's weights, the slab of its sessions and the buffers of its steps.

    max_rows: the most rows of a tick. deterministic: whether one tile is used for every number of rows, so that
    a row's sums are made in one order whatever shares its batch.
    """

    def __init__(
        self, config: ModelConfig, weights: CudaWeights, slab: CudaSlab, max_rows: int, *, deterministic: bool
    ) -> None:
        self.config, self.weights, self.slab = config, weights, slab
        self.device = slab.bits.device
        self.deterministic = deterministic
        self.width = padded_width(config.hidden_size)
        self.inner = self.width if config.input_size is None else padded_width(config.input_size)
        self.layer_stride = config.spec.state_vectors * 2 * self.width
        self.row_stride = config.num_layers * self.layer_stride
        self.row_multiple = DETERMINISTIC_ROWS if deterministic else MIN_ROWS
        self.max_rows = self.bucket(max_rows)
        self.num_multiprocessors = _DEFAULT_MULTIPROCESSORS
        self.max_run_programs = 1  # an interpreter runs one program after another, and these wait for each other
        if self.device.type == "cuda":
            self.num_multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.max_run_programs = self.num_multiprocessors  # one each, so that all are resident
        self.step = StepBuffers(config, self.max_rows, self.device)
        self._row_numbers = torch.arange(self.max_rows, dtype=torch.int32, device=self.device)
        is_gru = config.cell == "gru"
        scratch_rows = self.max_rows if is_gru else 0
        self.update = torch.zeros(scratch_rows, self.width, device=self.device)
        self.reset_bits = torch.zeros(scratch_rows, 2, self.width, dtype=torch.int16, device=self.device)
        self.head: HeadBuffers | None = None
        if weights.head_bias is not None:
            outputs = len(weights.head_bias)
            fitting = max(self.row_multiple, _MAX_LOGITS_AT_ONCE // outputs)
            # As many as a tick can ask for with one token each: log-probabilities from before it, the rest after.
            self.head = HeadBuffers(outputs, min(self.bucket(2 * max_rows), self.bucket(fitting)), self.device)

    def bucket(self, num_rows: int) -> int:
        """The rows that a tick of `num_rows` is padded to: a power of two times the smallest number of rows."""
        bucket = self.row_multiple
        while bucket < num_rows:
            bucket *= 2
        return bucket

    def cell_tile(self, num_rows: int) -> Tile:
        """The tile with which all products of a layer can be computed."""
        spec = self.config.spec
        num_sums = 2 if self.config.cell == "gru" else spec.num_blocks + spec.has_recurrent_bias
        return self._tile(num_rows, self.width, spec.num_blocks, num_sums)

    def _tile(self, num_rows: int, width: int, num_blocks: int, num_sums: int) -> Tile:
        return choose_tile(
            DETERMINISTIC_ROWS if self.deterministic else num_rows,
            width,
            num_blocks,
            num_sums,
            is_full=self.weights.is_full,
            num_multiprocessors=self.num_multiprocessors,
        )

    @property
    def options(self) -> dict[str, Any]:
        # Where a multiplication is fused with an addition is the compiler's choice, kernel by kernel.
        return {"enable_fp_fusion": False} if self.deterministic else {}

    def launch_step(self, num_rows: int) -> None:
        """Advance the first `num_rows` rows of the step buffers, a bucket, by one token."""
        spec, width = self.config.spec, self.width
        sources, targets, tokens = self.step.columns(num_rows).unbind(0)
        for layer in range(self.config.num_layers):
            shared = {
                "halves": self.slab.halves,
                "bits": self.slab.bits,
                "sources": sources,
                "tokens": tokens,
                "weight": self.weights.recurrent_weights[layer],
                "state_stride": self.row_stride,
                "state_offset": layer * self.layer_stride,
                **self._inputs(layer, targets),
            }
            if self.config.cell == "gru":
                self._launch_gru(num_rows, targets, shared)
                continue
            tile = self.cell_tile(num_rows)
            one_product_kernel[(self._programs(tile, num_rows, width),)](
                targets=targets,
                recurrent_bias=self.weights.recurrent_biases[layer],
                leak=self.weights.leaks[layer:],
                cell=self.config.cell,
                num_blocks=spec.num_blocks,
                **shared,
                **self._sizes(tile),
            )

    def launch_head(self, rows: Tensor, observed: Tensor, storage: Tensor | None = None) -> None:
        """Run the head on hidden vectors, a bucket of them, into the first rows of the head buffers.

        rows: (M,) int32, where each stands in storage (., 2, W) int16, or as the top layer of a row of the slab
        where that is None. observed: (M,) int32, the tokens whose log-probabilities are read off.
        """
        assert self.head is not None
        bits = self.slab.bits if storage is None else storage
        num_rows, outputs = len(rows), self.head.logits.shape[1]
        tile = self._tile(num_rows, outputs, 1, 1)
        logits_kernel[(self._programs(tile, num_rows, outputs),)](
            halves=bits.view(torch.bfloat16),
            bits=bits,
            rows=rows,
            logits=self.head.logits,
            weight=self.weights.head_weight,
            bias=self.weights.head_bias,
            width=self.width,
            num_outputs=outputs,
            is_full=self.weights.is_full,
            stride=self.row_stride if storage is None else 2 * self.width,
            offset=self.row_stride - self.layer_stride if storage is None else 0,
            tile_rows=tile.rows,
            tile_columns=tile.columns,
            depth=tile_depth(self.width),
            stages=tile.num_stages,
            num_warps=tile.num_warps,
            **self.options,
        )
        read_off_kernel[(num_rows,)](
            logits=self.head.logits,
            observed=observed,
            likeliest=self.head.likeliest,
            totals=self.head.totals,
            logprobs=self.head.logprobs,
            num_outputs=outputs,
            block=_READ_OFF_BLOCK,
            **self.options,
        )

    def launch_run(self, rows: RunRows, outputs: RunOutputs) -> None:
        """Advance rows by their own numbers of tokens."""
        weights, spec, num_rows = self.weights, self.config.spec, rows.sources.shape[0]
        vectors = rows.inputs.view(torch.bfloat16)
        tile = self.cell_tile(num_rows)
        programs = min(self.max_run_programs, self._programs(tile, num_rows, self.width))
        run_kernel[(programs,)](
            halves=self.slab.halves,
            bits=self.slab.bits,
            sources=rows.sources,
            targets=rows.targets,
            starts=rows.starts,
            counts=rows.counts,
            row_tiles=rows.row_tiles,
            arrivals=torch.zeros(1, dtype=torch.int32, device=self.device),
            tokens=rows.tokens,
            table=weights.biases if weights.table is None else weights.table,
            vector_halves=vectors,
            vector_bits=rows.inputs,
            first_weight=weights.recurrent_weights if weights.first_weight is None else weights.first_weight,
            input_weights=weights.input_weights,
            biases=weights.biases,
            recurrent_weights=weights.recurrent_weights,
            recurrent_biases=weights.recurrent_biases,
            leaks=weights.leaks,
            update=self.update,
            reset_halves=self.reset_bits.view(torch.bfloat16),
            reset_bits=self.reset_bits,
            hidden_places=rows.hidden_places,
            hidden_out=outputs.hidden,
            state_places=rows.state_places,
            states_out=outputs.states,
            gate_places=rows.gate_places,
            gates_out=outputs.gates,
            num_steps=rows.row_tiles.shape[0],
            num_rows=num_rows,
            cell=self.config.cell,
            num_layers=self.config.num_layers,
            num_vectors=spec.state_vectors,
            num_gates=len(spec.gate_names),
            inner=self.inner,
            num_blocks=spec.num_blocks,
            is_table=weights.table is not None,
            input_depth=tile_depth(self.inner),
            **self._sizes(tile),
            **({"launch_cooperative_grid": True} if self.device.type == "cuda" else {}),
        )

    def _launch_gru(self, num_rows: int, targets: Tensor, shared: dict[str, Any]) -> None:
        width = self.width
        shared = shared | {"update": self.update, "reset_bits": self.reset_bits}
        tile = self.cell_tile(num_rows) if self.deterministic else self._tile(num_rows, width, 2, 2)
        gates_kernel[(self._programs(tile, num_rows, width),)](**shared, **self._sizes(tile))
        tile = tile if self.deterministic else self._tile(num_rows, width, 1, 1)
        candidate_kernel[(self._programs(tile, num_rows, width),)](
            targets=targets,
            reset_halves=self.reset_bits.view(torch.bfloat16),
            **shared,
            **self._sizes(tile),
        )

    def _inputs(self, layer: int, targets: Tensor) -> dict[str, Any]:
        """A layer's input side: the table, the vectors of the step buffers, or the new state of the layer below."""
        weights, width = self.weights, self.width
        shared = {
            "table": weights.biases if weights.table is None else weights.table,
            "bias": weights.biases[layer],
            "is_table": layer == 0 and weights.table is not None,
        }
        if layer > 0:
            return shared | {
                "below_halves": self.slab.halves,
                "below_bits": self.slab.bits,
                "below_rows": targets,
                "below_stride": self.row_stride,
                "below_offset": (layer - 1) * self.layer_stride,
                "input_weight": weights.input_weights[layer - 1],
                "inner": width,
                "input_depth": tile_depth(width),
            }
        return shared | {
            "below_halves": self.step.inputs.view(torch.bfloat16),
            "below_bits": self.step.inputs,
            "below_rows": self._row_numbers,
            "below_stride": 2 * self.inner,
            "below_offset": 0,
            "input_weight": weights.recurrent_weights if weights.first_weight is None else weights.first_weight,
            "inner": self.inner,
            "input_depth": tile_depth(self.inner),
        }

    def _sizes(self, tile: Tile) -> dict[str, Any]:
        return {
            "width": self.width,
            "is_full": self.weights.is_full,
            "tile_rows": tile.rows,
            "tile_columns": tile.columns,
            "depth": tile_depth(self.width),
            "stages": tile.num_stages,
            "num_warps": tile.num_warps,
            **self.options,
        }

    def _programs(self, tile: Tile, num_rows: int, width: int) -> int:
        return (num_rows // tile.rows) * (width // tile.columns)
