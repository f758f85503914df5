"""The server's settings: read once, from flags, the environment, a TOML file and defaults, in this order."""

import ipaddress
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from cellserve_service.limits import EngineLimits
from cellserve_service.stores import open_store

ENVIRONMENT_PREFIX = "CELLSERVE_"


def _check_address(address: str) -> str:
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("an address is HOST:PORT, with a port from 0 to 65535")
    return address


Address = Annotated[str, AfterValidator(_check_address)]


class Settings(BaseSettings):
    """Serve recurrent models over gRPC, with every session's hidden state on this machine's device."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_prog_name="cellserve-server",
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    config: Path | None = Field(None, description="A TOML file with settings, named as here with underscores.")
    listen: Address = Field("127.0.0.1:50051", description="Where gRPC is served.")
    workers: int = Field(
        1, ge=1, le=256, description="Processes that speak gRPC: 1 is the engine's own, several are beside it."
    )
    metrics_listen: Address = Field("127.0.0.1:9464", description="Where Prometheus metrics are served.")
    models: Path | None = Field(
        None,
        description="A directory of models, <name>/<version>/config.json and model.safetensors. Default: bundled.",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+)$",
        description="auto, cpu, cuda or cuda:N: where states live.",
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="Threads for the arithmetic on a CPU. Default: one less than the cores."
    )
    store: str = Field(
        "",
        description="URL of the state store, sqlite:///FILE or redis://HOST:PORT/DB; empty: none, and states live as "
        "long as the server.",
    )
    max_sessions: int = Field(65536, ge=1, le=2**30, description="Sessions that can be open at once.")
    evict_when_full: bool = Field(
        False, description="Make room for new sessions by ending the longest idle ones; they are told."
    )
    max_slots: int = Field(
        65536,
        ge=1,
        le=2**30,
        description="States of a model on the device at once; longest idle ones park in host memory.",
    )
    max_parked_states: int = Field(
        65536, ge=0, description="States parked in host memory; longest idle durable ones are left to the store."
    )
    max_checkpoints: int = Field(8, ge=1, le=1024, description="Marked states of a session to roll back to.")
    idle_timeout_seconds: PositiveFloat = Field(3600, description="Idle time after which a session expires.")
    ended_session_memory_seconds: PositiveFloat = Field(
        600, description="How long the server can tell why a session ended."
    )
    max_held_answers: int = Field(64, ge=1, le=2**20, description="Answers of a session held for retries.")
    max_held_answer_bytes: int = Field(
        65536, ge=4, le=2**30, description="Bytes of answers of a session held for retries."
    )
    max_run_tokens: int = Field(4096, ge=1, le=2**20, description="Tokens of one run.")
    max_session_pending_tokens: int = Field(8192, ge=1, le=2**30, description="Tokens of a session waiting at once.")
    max_pending_tokens: PositiveInt = Field(1048576, description="Tokens waiting at once, of all sessions.")
    max_message_bytes: int = Field(4194304, ge=1024, le=2**30, description="Bytes of one message from a client.")
    max_answer_bytes: int = Field(
        1048576, ge=1024, le=2**30, description="Bytes of outputs in one message to a client."
    )
    max_stream_unsent_bytes: int = Field(
        16777216, ge=1024, description="Bytes waiting for a slow reader before its stream is not read from."
    )
    max_concurrent_streams: PositiveInt = Field(4096, description="Calls at once on one connection.")
    drain_timeout_seconds: float = Field(30, ge=0, description="How long a stopping server finishes accepted work.")
    checkpoint_interval_seconds: PositiveFloat = Field(1, description="How often states are written to the store.")
    deterministic: bool = Field(
        False, description="Bit-identical outputs whatever shares a batch; slower for few sessions."
    )
    weights: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 on a GPU, float32 on a CPU. bfloat16 on a CPU with AVX-512 BF16: large models step "
        "twice as fast, with states within 0.01 (root mean square) of exact ones; not with deterministic.",
    )
    allow_insecure: bool = Field(False, description="Listen beyond loopback without TLS.")
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain.")
    tls_private_key: Path | None = Field(None, description="PEM file of the certificate's key.")
    tls_client_ca: Path | None = Field(None, description="PEM file of the authority that clients must show one of.")
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error.")

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_private_key is None):
            raise ValueError("tls_certificate and tls_private_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate")
        if self.tls_certificate is None and not self.allow_insecure and not _is_loopback(self.listen):
            raise ValueError(
                f"listen {self.listen} is beyond loopback without TLS: "
                "give tls_certificate and tls_private_key, or allow_insecure"
            )
        if self.deterministic and self.weights == "bfloat16":
            raise ValueError(f"deterministic goes with float32 weights only, not with {self.weights}")
        if self.store:
            open_store(self.store, replica=0, ended_memory_seconds=self.ended_session_memory_seconds)
        if self.max_run_tokens > self.max_session_pending_tokens:
            raise ValueError("max_run_tokens is above max_session_pending_tokens")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls)

    def engine_limits(self) -> EngineLimits:
        """The bounds that the engine keeps."""
        return EngineLimits(
            max_sessions=self.max_sessions,
            evict_when_full=self.evict_when_full,
            max_run_tokens=self.max_run_tokens,
            max_session_pending_tokens=self.max_session_pending_tokens,
            max_pending_tokens=self.max_pending_tokens,
            max_held_answers=self.max_held_answers,
            max_held_answer_bytes=self.max_held_answer_bytes,
            max_answer_bytes=self.max_answer_bytes,
            max_parked_states=self.max_parked_states,
            max_checkpoints=self.max_checkpoints,
            idle_timeout_seconds=self.idle_timeout_seconds,
            ended_session_memory_seconds=self.ended_session_memory_seconds,
        )


class _ConfigFile(TomlConfigSettingsSource):
    """The TOML file that flag or environment name."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, toml_file=None)

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if not path:
            return {}
        return self._read_file(Path(str(path)))


def read_settings(arguments: Sequence[str]) -> Settings:
    """The settings of a command line. Exits with status 2 and one line where they are unknown or impossible."""
    try:
        return Settings(_cli_parse_args=list(arguments))  # type: ignore[call-arg] # pydantic's own keyword
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            _exit(f"there is no setting {name}; `cellserve-server --help` lists them")
        _exit(f"setting {name}: {message[:1].lower()}{message[1:]}" if name else message)
    except SettingsError as error:
        _exit(str(error).splitlines()[0].removeprefix("error parsing CLI: "))
    except tomllib.TOMLDecodeError as error:
        _exit(f"the configuration file is no TOML: {error}")
    except OSError as error:
        _exit(f"cannot read the configuration file {error.filename}: {error.strerror}")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _exit(message: str) -> NoReturn:
    print(f"cellserve-server: {message}", file=sys.stderr)  # noqa: T201 - it is what the command says
    raise SystemExit(2)
