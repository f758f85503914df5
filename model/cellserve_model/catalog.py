"""Finds models: which names and versions a models directory holds, and where the bundled ones are."""

from __future__ import annotations

from pathlib import Path

from cellserve_model.config import CONFIG_FILE
from cellserve_model.errors import ModelFileError

__all__ = ["bundled_models_directory", "list_models"]


def bundled_models_directory() -> Path:
    """The folder of the models that come with this package."""
    return Path(__file__).resolve().parent / "models"


def list_models(directory: Path) -> dict[str, list[int]]:
    """Name to versions, smallest first, of the models in `directory`; the last one serves new sessions.

    A version is a folder `<name>/<integer>/` with a config.json; anything else is let lie. Whether the files
    are sound is checked when one is loaded. Raises ModelFileError where there is no such directory.
    """
    if not directory.is_dir():
        raise ModelFileError(f"{directory}: no such directory; it should hold <name>/<version>/{CONFIG_FILE}")
    versions_by_name: dict[str, list[int]] = {}
    for folder in sorted(directory.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        versions = sorted(
            int(entry.name) for entry in folder.iterdir() if _is_version(entry.name) and (entry / CONFIG_FILE).is_file()
        )
        if versions:
            versions_by_name[folder.name] = versions
    return versions_by_name


def _is_version(name: str) -> bool:
    # One spelling for each version, so that 1, 01 and a superscript one are not three models called 1.
    return name.isascii() and name.isdecimal() and str(int(name)) == name
