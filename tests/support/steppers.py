"""Steppers without torch: exact arithmetic on a slab of numpy, for tests of the engine.

A state's numbers are whole, below 8,191, and depend on every token that came before and on their order, so that a token
that is lost, doubled, moved or given to another session shows. Symbols: B rows of a tick, N tokens, L layers, S numbers
of a layer's state, H hidden size, V vocabulary, O output size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cellserve_service.stepping import FloatArray, IntArray, TokenArray, Want

__all__ = ["FakeGenerated", "FakeModel", "FakeStepped", "FakeStepper", "Outputs"]

PRIME = 8191


@dataclass(frozen=True)
class Outputs:
    """What the model says at one token, before it is asked for."""

    logits: FloatArray  # (O,)
    logprob: float  # of the token, from the state before it
    state: FloatArray  # (L, S)
    gates: FloatArray  # (G, L, H)

    def top(self, k: int) -> tuple[TokenArray, FloatArray]:
        """The k likeliest next tokens, likeliest first, with their log-probabilities."""
        order = np.argsort(-self.logits, kind="stable")[:k].astype(np.uint32)
        return order, _log_softmax(self.logits)[order]


@dataclass(frozen=True)
class FakeModel:
    """What a model is, and its mathematics on one state."""

    name: str = "fake"
    version: int = 1
    cell: str = "fake_cell"
    num_layers: int = 2
    hidden_size: int = 2
    state_size: int = 3
    vocab_size: int | None = 7
    input_size: int | None = None
    output_size: int | None = 7
    gate_names: tuple[str, ...] = ("update", "reset")
    num_parameters: int = 1
    device: str = "cpu"

    @property
    def fingerprint(self) -> bytes:
        return self.name.encode().ljust(32, b".")

    def zero_state(self) -> FloatArray:
        return np.zeros((self.num_layers, self.state_size), np.float32)

    def advance(self, state: FloatArray, token: FloatArray | np.uint32) -> tuple[FloatArray, Outputs]:
        """The state after one token, an id or a vector, and what can be asked for there."""
        weights = np.arange(1, 1 + np.size(token))
        value = int(np.abs(np.sum(np.ravel(token).astype(np.float64) * weights))) + 1
        after = np.zeros_like(state, np.int64)
        for layer in range(self.num_layers):
            below = value if layer == 0 else int(after[layer - 1].sum())
            units = np.arange(self.state_size)
            after[layer] = (31 * state[layer].astype(np.int64) + 7 * below + 3 * units + layer) % PRIME
        new = after.astype(np.float32)
        logprob = 0.0
        if self.vocab_size is not None and self.output_size == self.vocab_size:
            logprob = float(_log_softmax(self.logits(state))[int(token)])
        gates = np.stack([(new[:, : self.hidden_size] + gate) % 11 for gate in range(len(self.gate_names))] or [new])
        return new, Outputs(self.logits(new), logprob, new, gates)

    def logits(self, state: FloatArray) -> FloatArray:
        top = state[-1].astype(np.int64)
        units = np.arange(self.output_size or 0)
        logits: FloatArray = (((units + 2) * top[units % self.state_size] + 13 * units) % 97 / 8).astype(np.float32)
        return logits

    def draw(self, state: FloatArray, position: int, seed: int, temperature: float, top_k: int, top_p: float) -> int:
        """The token sampled at a position: a function of the state, the settings and nothing else."""
        logits = self.logits(state)
        if temperature == 0:
            return int(np.argmax(logits))
        mixed = (seed * 1_000_003 + position * 7919 + int(temperature * 100) + top_k * 13 + int(top_p * 100)) % 104729
        return int((mixed + int(logits.sum() * 8)) % len(logits))


@dataclass(frozen=True)
class FakeStepped:
    """A StepResult: each array has one row for each token that asked."""

    next_tokens: TokenArray
    top_tokens: TokenArray
    top_logprobs: FloatArray
    logprobs: FloatArray
    logits: FloatArray
    states: FloatArray
    gates: FloatArray
    num_padding_rows: int = 0
    compute_seconds: float = 1e-6


@dataclass(frozen=True)
class FakeGenerated:
    """A GenerateResult."""

    tokens: TokenArray
    logprobs: FloatArray
    counts: IntArray
    num_padding_rows: int = 0
    compute_seconds: float = 1e-6


@dataclass
class _Ticket:
    slots: set[int]
    result: FakeStepped | FakeGenerated
    collected: bool = False


@dataclass
class FakeStepper:
    """A Stepper that also checks its caller: a slot in a tick is touched by nobody until the tick is collected."""

    info: FakeModel = field(default_factory=FakeModel)
    num_slots: int = 8
    max_batch: int = 8
    failure: Exception | None = None
    closed: bool = False
    compute_seconds: float = 1e-6  # that each tick takes

    @property
    def efficient_batch(self) -> int:
        return self.max_batch

    def __post_init__(self) -> None:
        # What a slot holds before it is given must never be seen.
        shape = (self.num_slots + 1, self.info.num_layers, self.info.state_size)
        self.slab = np.full(shape, 1234.0, np.float32)
        self.in_flight: set[int] = set()
        self.batches: list[IntArray] = []  # counts of every tick of runs

    def submit(
        self,
        slots: IntArray,
        counts: IntArray,
        tokens: TokenArray | FloatArray,
        wants: NDArray[np.uint8],
        top_k: int,
    ) -> _Ticket:
        self._check(slots)
        assert counts.min() >= 1
        assert len(tokens) == len(wants) == counts.sum()
        assert tokens.ndim == (1 if self.info.input_size is None else 2)
        self.batches.append(counts.copy())
        outputs: list[tuple[Want, Outputs]] = []
        token = 0
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            for _ in range(count):
                self.slab[slot], after = self.info.advance(self.slab[slot], tokens[token])
                outputs.append((Want(int(wants[token])), after))
                token += 1
        return self._ticket(slots, self._stepped(outputs, top_k))

    def submit_generate(
        self,
        slots: IntArray,
        num_tokens: IntArray,
        positions: IntArray,
        seeds: NDArray[np.uint64],
        temperatures: FloatArray,
        top_ks: IntArray,
        top_ps: FloatArray,
        stop_tokens: IntArray,
    ) -> _Ticket:
        self._check(slots)
        assert (num_tokens >= 1).all()
        most = int(num_tokens.max())
        tokens = np.zeros((len(slots), most), np.uint32)
        logprobs = np.zeros((len(slots), most), np.float32)
        counts = np.zeros(len(slots), np.int64)
        for row, slot in enumerate(slots.tolist()):
            settings = (int(seeds[row]), float(temperatures[row]), int(top_ks[row]), float(top_ps[row]))
            for place in range(int(num_tokens[row])):
                token = self.info.draw(self.slab[slot], int(positions[row]) + place, *settings)
                self.slab[slot], after = self.info.advance(self.slab[slot], np.uint32(token))
                tokens[row, place], logprobs[row, place] = token, after.logprob
                counts[row] += 1
                if token in stop_tokens[row]:
                    break
        return self._ticket(slots, FakeGenerated(tokens, logprobs, counts))

    def collect(self, ticket: _Ticket) -> FakeStepped | FakeGenerated:
        assert not ticket.collected
        ticket.collected = True
        self.in_flight -= ticket.slots
        if self.failure is not None:
            raise self.failure
        return ticket.result

    def read_rows(self, slots: IntArray) -> FloatArray:
        self._check_free(slots)
        return self.slab[slots].copy()

    def write_rows(self, slots: IntArray, rows: FloatArray) -> None:
        self._check_free(slots)
        assert rows.shape == (len(slots), *self.slab.shape[1:])
        self.slab[slots] = rows

    def zero_rows(self, slots: IntArray) -> None:
        self._check_free(slots)
        self.slab[slots] = 0

    def warm_up(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _check(self, slots: IntArray) -> None:
        self._check_free(slots)
        assert 1 <= len(slots) <= self.max_batch

    def _check_free(self, slots: IntArray) -> None:
        listed = slots.tolist()
        assert len(set(listed)) == len(listed)
        assert all(1 <= slot <= self.num_slots for slot in listed)
        assert self.in_flight.isdisjoint(listed)

    def _ticket(self, slots: IntArray, result: FakeStepped | FakeGenerated) -> _Ticket:
        self.in_flight |= set(slots.tolist())
        return _Ticket(set(slots.tolist()), result)

    def _stepped(self, outputs: Sequence[tuple[Want, Outputs]], top_k: int) -> FakeStepped:
        def of(want: Want) -> list[Outputs]:
            return [output for wants, output in outputs if want in wants]

        info = self.info
        tops = [output.top(top_k) for output in of(Want.TOP_K)]
        gates_shape = (0, len(info.gate_names), info.num_layers, info.hidden_size)
        return FakeStepped(
            next_tokens=np.array([output.logits.argmax() for output in of(Want.NEXT_TOKEN)], np.uint32),
            top_tokens=_stack([tokens for tokens, _ in tops], (0, top_k), np.uint32),
            top_logprobs=_stack([logprobs for _, logprobs in tops], (0, top_k)),
            logprobs=np.array([output.logprob for output in of(Want.LOGPROB)], np.float32),
            logits=_stack([output.logits for output in of(Want.HEAD_OUTPUT)], (0, info.output_size or 0)),
            states=_stack([output.state for output in of(Want.STATE)], (0, *self.slab.shape[1:])),
            gates=_stack([output.gates for output in of(Want.GATES)], gates_shape),
            compute_seconds=self.compute_seconds,
        )


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max(initial=0.0)
    logprobs: FloatArray = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    return logprobs


def _stack(rows: Sequence[NDArray[np.generic]], empty: tuple[int, ...], dtype: type = np.float32) -> NDArray:  # type: ignore[type-arg]
    return np.stack(rows).astype(dtype) if rows else np.empty(empty, dtype)
