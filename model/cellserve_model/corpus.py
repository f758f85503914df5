"""The text that the bundled model learns: the standard library's source, and which files are held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SourceFile", "corpus_digest", "held_out_files", "is_held_out", "standard_library_files"]

_HELD_OUT_ONE_IN = 10
_INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of Python source; module: its dotted name, the same on every machine."""

    module: str
    path: Path

    def read_bytes(self) -> bytes:
        return self.path.read_bytes()


def is_held_out(module: str) -> bool:
    """Whether the file of this dotted module name is kept from training: one in ten, the same everywhere."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def standard_library_files() -> list[SourceFile]:
    """Every non-empty *.py of this Python's standard library, its tests included, by module name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _INSTALLED_PACKAGES.isdisjoint(parts) and path.is_file() and path.stat().st_size > 0:
            files.append(SourceFile(module=_module_name(parts), path=path))
    return sorted(files, key=lambda file: file.module)


def held_out_files(*, min_bytes: int = 0) -> list[SourceFile]:
    """The standard library files that training never saw, of at least `min_bytes` bytes, by module name."""
    return [
        file for file in standard_library_files() if is_held_out(file.module) and file.path.stat().st_size >= min_bytes
    ]


def corpus_digest(files: Iterable[SourceFile]) -> str:
    """SHA-256 (hex) over names and contents, in the order given: equal digests mean equal text."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.module.encode()).digest())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _module_name(parts: tuple[str, ...]) -> str:
    is_package = parts[-1] == "__init__" and len(parts) > 1
    return ".".join(parts[:-1] if is_package else parts)
