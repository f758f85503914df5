"""Trains a byte model by truncated back-propagation, with checkpoints from which it resumes exactly.

Symbols: T steps of a chunk, B rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from cellserve_model.config import ModelConfig, TokenInput
from cellserve_model.errors import TrainingError
from cellserve_model.files import replace_file
from cellserve_model.network import Network
from cellserve_model.streams import ByteStreams

__all__ = ["Trainer", "TrainingSettings"]

_NUM_BYTES = 256
_OPTIMIZER_TENSORS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything that the trained weights depend on, beside the text; recorded in the model card."""

    cell: str = "gru"
    num_layers: int = 1
    hidden_size: int = 512
    embedding_size: int = 96
    num_rows: int = 64  # B: files are read in so many rows side by side
    num_steps: int = 64  # T: steps through which a gradient flows
    max_tokens: int = 47_000_000  # bytes to learn from; the learning rate falls to its end over them
    peak_learning_rate: float = 2e-3
    final_learning_rate: float = 2e-5
    warm_up_tokens: int = 1_000_000
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    seed: int = 0

    def model_config(self) -> ModelConfig:
        return ModelConfig(
            cell=self.cell,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            input=TokenInput(vocab_size=_NUM_BYTES, embedding_size=self.embedding_size),
            output_size=_NUM_BYTES,
        )

    def learning_rate(self, num_tokens: int) -> float:
        """Rises linearly, then falls by a half cosine to the end of the budget. Loshchilov & Hutter 2017."""
        if num_tokens < self.warm_up_tokens:
            return self.peak_learning_rate * (num_tokens + 1) / self.warm_up_tokens
        done = (num_tokens - self.warm_up_tokens) / max(1, self.max_tokens - self.warm_up_tokens)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.final_learning_rate + (self.peak_learning_rate - self.final_learning_rate) * falling


class Trainer:
    """A network on its way: weights, moments of the optimiser, and the state carried from chunk to chunk.

    contents: the files of the training text. Raises TrainingError where they are too few for the rows.
    """

    def __init__(self, settings: TrainingSettings, contents: Sequence[bytes], *, device: torch.device) -> None:
        self.settings = settings
        self.num_updates = 0
        # (tokens learned by then, budget from there on): more than one where a budget was changed on the way.
        self.budgets: list[tuple[int, int]] = [(0, settings.max_tokens)]
        self.network = Network(settings.model_config(), seed=settings.seed).to(device)
        self.device = device
        self._streams = ByteStreams(
            contents, num_rows=settings.num_rows, num_steps=settings.num_steps, seed=settings.seed
        )
        self._state = self.network.zero_state(settings.num_rows)
        parameters = dict(self.network.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [tensor for tensor in parameters.values() if tensor.ndim > 1]},
            {"params": [tensor for tensor in parameters.values() if tensor.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=settings.peak_learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def num_tokens(self) -> int:
        """Bytes learned from so far."""
        return self.num_updates * self.settings.num_rows * self.settings.num_steps

    @property
    def is_finished(self) -> bool:
        return self.num_tokens >= self.settings.max_tokens

    def update(self) -> Tensor:
        """Learn from one chunk. Returns its mean loss in nats per byte, () float32, on the device."""
        chunk = self._streams.chunk(self.num_updates)
        if chunk.starts_epoch:
            self._state = torch.zeros_like(self._state)
        inputs = torch.from_numpy(chunk.inputs).to(self.device, torch.int64)  # (T, B)
        targets = torch.from_numpy(chunk.targets).to(self.device, torch.int64)  # (T, B)
        keep = torch.from_numpy(chunk.keep).to(self.device, torch.float32).unsqueeze(2)  # (T, B, 1)
        hidden, last_state = self.network(inputs, self._state, keep)  # (T, B, H)
        assert self.network.head is not None
        # Where a target starts a file, `hidden` is zero: it is predicted as a new session's first byte will
        # be.
        loss = functional.cross_entropy(self.network.head(hidden).flatten(0, 1), targets.flatten())
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.num_tokens)
        self._optimizer.step()
        self.network.constrain()
        self._state = last_state.detach()
        self.num_updates += 1
        return loss.detach()

    def save_checkpoint(self, path: Path) -> None:
        """Write all that the next update depends on; `path` holds the old checkpoint or the new, whole."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.tensors().items()}
        for name, parameter in self.network.named_parameters():
            for kind in _OPTIMIZER_TENSORS if parameter in self._optimizer.state else ():
                tensors[f"optimizer.{name}.{kind}"] = self._optimizer.state[parameter][kind]
        tensors["state"] = self._state
        metadata = {
            "num_updates": str(self.num_updates),
            "settings": json.dumps(_identity(self.settings)),
            "budgets": json.dumps(self.budgets),
        }
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, safetensors.torch.save(on_host, metadata))

    def load_checkpoint(self, path: Path) -> None:
        """Go on from a checkpoint. The budget may differ; raises TrainingError where another setting does."""
        try:
            with safe_open(path, framework="pt") as opened:
                metadata: Mapping[str, str] = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise TrainingError(f"{path}: not a whole checkpoint ({error}); start anew with --no-resume") from None
        stored, wanted = json.loads(metadata["settings"]), _identity(self.settings)
        changed = [name for name in wanted if stored.get(name) != wanted[name]]
        if changed:
            raise TrainingError(
                f"{path} was made with other settings ({', '.join(changed)}); use those, or start anew with --no-resume"
            )
        self.num_updates = int(metadata["num_updates"])
        self.budgets = [(start, budget) for start, budget in json.loads(metadata["budgets"])]
        if self.budgets[-1][1] != self.settings.max_tokens:
            self.budgets.append((self.num_tokens, self.settings.max_tokens))
        parameters = dict(self.network.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"network.{name}"])
                stored_moments = {kind: tensors.get(f"optimizer.{name}.{kind}") for kind in _OPTIMIZER_TENSORS}
                if stored_moments["step"] is not None:
                    self._optimizer.state[parameter] = {
                        kind: tensor.to(self.device) for kind, tensor in stored_moments.items() if tensor is not None
                    }
        self._state = tensors["state"].to(self.device)


def _identity(settings: TrainingSettings) -> dict[str, object]:
    # The budget may be raised or lowered on the way: it only bends the rest of the learning rate's curve.
    return {name: value for name, value in asdict(settings).items() if name != "max_tokens"}
