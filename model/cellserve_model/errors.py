"""The errors of this package: what was wrong, where, and what to do about it.

ModelError
├── ConfigError       config.json, or the sizes a caller gave, describe no model that exists
├── ModelFileError    a model directory or its tensors are missing, damaged or of another shape
├── ConversionError   a torch.nn module that cannot be served as it is
├── DeviceError       the device asked for is not on this machine
└── TrainingError     training cannot start or go on
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ConversionError",
    "DeviceError",
    "ModelError",
    "ModelFileError",
    "TrainingError",
    "WeightsError",
]


class ModelError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ModelError):
    """A configuration that describes no model: an unknown cell, a size out of range, a missing field."""


class ModelFileError(ModelError):
    """A model directory that cannot be served: files or tensors missing, damaged, or of another shape."""


class ConversionError(ModelError):
    """A torch.nn module with a feature that no cell of this project has."""


class DeviceError(ModelError):
    """A device that this machine or this build of torch does not have."""


class WeightsError(ModelError):
    """Weights that cannot be served as rounded: with `deterministic`, on this device, or because states drift."""


class TrainingError(ModelError):
    """Training that cannot start or go on: no corpus, another checkpoint, a loss that is not finite."""
