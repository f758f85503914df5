"""Turns a device setting into a torch device, or says why it cannot."""

from __future__ import annotations

import re

import torch

from cellserve_model.errors import DeviceError

__all__ = ["choose_device"]


def choose_device(setting: str) -> torch.device:
    """`auto` (cuda where there is one), `cpu`, `cuda` or `cuda:N`. Raises DeviceError where there is none."""
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    if setting == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", setting, flags=re.ASCII)
    if match is None:
        raise DeviceError(f"device {setting!r} is unknown; use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        built = "has no CUDA support" if torch.version.cuda is None else "sees no GPU on this machine"
        raise DeviceError(f"device {setting!r} was asked for, but torch {torch.__version__} {built}; use cpu or auto")
    index = int(match.group(1) or 0)
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {setting!r} does not exist; this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
