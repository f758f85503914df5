"""Loads the tests' models onto the CPU."""

from __future__ import annotations

from pathlib import Path

from cellserve_model import Stepper, load_stepper

__all__ = ["LoadStepper"]


class LoadStepper:
    """Loads a model directory onto the CPU with a small slab."""

    def __call__(
        self, directory: Path, *, num_slots: int = 32, max_batch: int = 16, deterministic: bool = False
    ) -> Stepper:
        stepper = load_stepper(
            directory,
            name="tiny",
            version=1,
            device="cpu",
            num_slots=num_slots,
            max_batch=max_batch,
            deterministic=deterministic,
        )
        stepper.warm_up()
        return stepper
