"""What the six cells are called and how they are laid out; their equations are in equations.py.

Symbols: H hidden size, G number of row blocks of a layer's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CELLS", "CellSpec"]


@dataclass(frozen=True, slots=True)
class CellSpec:
    """The layout of one kind of cell.

    name: as in config.json. blocks: what each of the G blocks of H rows of a layer's weights computes, in
    file order. gate_names: the gates a client can ask for, each a vector of H numbers in [0, 1].
    state_vectors: how many vectors of H numbers a session carries for each layer (2 for h and c).
    """

    name: str
    blocks: tuple[str, ...]
    gate_names: tuple[str, ...]
    state_vectors: int = 1
    has_recurrent_bias: bool = False
    has_leak: bool = False

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)


CELLS: dict[str, CellSpec] = {
    spec.name: spec
    for spec in (
        CellSpec("vanilla_rnn", blocks=("candidate",), gate_names=()),
        CellSpec("leaky_rnn", blocks=("candidate",), gate_names=("leak",), has_leak=True),
        CellSpec("simplified_gru", blocks=("forget", "candidate"), gate_names=("forget",)),
        CellSpec("gru", blocks=("update", "reset", "candidate"), gate_names=("update", "reset")),
        CellSpec(
            "gru_reset_after",
            blocks=("update", "reset", "candidate"),
            gate_names=("update", "reset"),
            has_recurrent_bias=True,
        ),
        CellSpec(
            "lstm",
            blocks=("input", "forget", "candidate", "output"),
            gate_names=("input", "forget", "output"),
            state_vectors=2,
        ),
    )
}
