"""Recurrent networks for cellserve: model files, training, and the stepper that advances many sessions.

Nothing here knows gRPC. Names are loaded on first use, so that reading a model's configuration or the corpus
never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cellserve_model.catalog import bundled_models_directory, list_models
    from cellserve_model.cells import CELLS, CellSpec
    from cellserve_model.config import ModelConfig, TokenInput, VectorInput
    from cellserve_model.conversion import from_torch
    from cellserve_model.corpus import SourceFile, held_out_files, is_held_out, standard_library_files
    from cellserve_model.errors import (
        ConfigError,
        ConversionError,
        DeviceError,
        ModelError,
        ModelFileError,
        TrainingError,
        WeightsError,
    )
    from cellserve_model.files import ModelFiles, read_model, write_model
    from cellserve_model.interface import Stepper
    from cellserve_model.loading import load_stepper
    from cellserve_model.network import Network
    from cellserve_model.ticks import GenerateResult, ModelInfo, StepResult, Want

_MODULE_BY_NAME = {
    "CELLS": "cells",
    "CellSpec": "cells",
    "ConfigError": "errors",
    "ConversionError": "errors",
    "DeviceError": "errors",
    "GenerateResult": "ticks",
    "ModelConfig": "config",
    "ModelError": "errors",
    "ModelFileError": "errors",
    "ModelFiles": "files",
    "ModelInfo": "ticks",
    "Network": "network",
    "SourceFile": "corpus",
    "StepResult": "ticks",
    "Stepper": "interface",
    "TokenInput": "config",
    "TrainingError": "errors",
    "VectorInput": "config",
    "Want": "ticks",
    "WeightsError": "errors",
    "bundled_models_directory": "catalog",
    "from_torch": "conversion",
    "held_out_files": "corpus",
    "is_held_out": "corpus",
    "list_models": "catalog",
    "load_stepper": "loading",
    "read_model": "files",
    "standard_library_files": "corpus",
    "write_model": "files",
}

__all__ = [
    "CELLS",
    "CellSpec",
    "ConfigError",
    "ConversionError",
    "DeviceError",
    "GenerateResult",
    "ModelConfig",
    "ModelError",
    "ModelFileError",
    "ModelFiles",
    "ModelInfo",
    "Network",
    "SourceFile",
    "StepResult",
    "Stepper",
    "TokenInput",
    "TrainingError",
    "VectorInput",
    "Want",
    "WeightsError",
    "bundled_models_directory",
    "from_torch",
    "held_out_files",
    "is_held_out",
    "list_models",
    "load_stepper",
    "read_model",
    "standard_library_files",
    "write_model",
]


def __getattr__(name: str) -> object:
    module = _MODULE_BY_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
