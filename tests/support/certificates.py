"""Makes certificates of an authority of the tests' own."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.programs import run_program


@dataclass(frozen=True)
class Certificates:
    """PEM files of an authority, and of a server and a client that it has signed."""

    folder: Path

    def __post_init__(self) -> None:
        self._openssl("req", "-x509", "-subj", "/CN=authority", "-keyout", "authority.key", "-out", "authority.pem")
        for name in ("server", "client"):
            names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
            authority = ["-CA", "authority.pem", "-CAkey", "authority.key"]
            self._openssl("req", "-x509", *names, *authority, "-keyout", f"{name}.key", "-out", f"{name}.pem")

    def _openssl(self, *arguments: str) -> None:
        files = [
            str(self.folder / argument) if argument.endswith((".key", ".pem")) else argument for argument in arguments
        ]
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        run_program("openssl", *files, *key, hint="your system's openssl package")

    def path(self, name: str) -> Path:
        return self.folder / name

    def bytes(self, name: str) -> bytes:
        return self.path(name).read_bytes()
