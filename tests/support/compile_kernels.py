"""Compiles kernels for a Hopper GPU on a machine that has none, as `python -m tests.support.compile_kernels`.

Each is compiled as a stepper would launch it. Prints a line of JSON a kernel: its name,
the bytes of shared memory it takes, and whether the matrix units of whole warp groups multiply in it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cellserve_model.config import ModelConfig, TokenInput, VectorInput
from cellserve_model.cuda import generation, network
from cellserve_model.cuda.loading import make_stepper
from cellserve_model.ticks import ModelInfo

_HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = frozenset({"num_warps", "launch_cooperative_grid", "enable_fp_fusion"})
_KERNELS = {
    network: (
        "one_product_kernel",
        "gates_kernel",
        "candidate_kernel",
        "run_kernel",
        "logits_kernel",
        "read_off_kernel",
    ),
    generation: ("sample_kernel", "turn_kernel"),
}


class _Compiler:
    """Stands in the place of a kernel: a launch compiles it, once for the same constants."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._seen: set[str] = set()

    def __getitem__(self, grid: object) -> _Compiler:
        return self

    def __call__(self, **arguments: Any) -> None:
        constants = {param.name: arguments[param.name] for param in self._kernel.params if param.is_constexpr}
        options = {"num_stages": constants.get("stages", 3)}
        options |= {name: value for name, value in arguments.items() if name in _OPTIONS}
        names = [param.name for param in self._kernel.params]
        signature = {name: "constexpr" if name in constants else _type_of(arguments[name]) for name in names}
        key = repr((constants, options, signature))  # offsets differ only by multiples of 16
        if key in self._seen:
            return
        self._seen.add(key)
        aligned = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name in names
            if signature[name][0] == "*" or (signature[name] == "i32" and arguments[name] % 16 == 0)
        }
        source = ASTSource(
            self._kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        compiled = triton.compile(source, target=_HOPPER, options=options)
        report = {
            "kernel": self._kernel.fn.__name__,
            "cell": constants.get("cell"),
            "shared_bytes": compiled.metadata.shared,
            "has_warp_group_products": "wgmma.mma_async" in compiled.asm["ptx"],
        }
        print(json.dumps(report), flush=True)


def _type_of(value: Any) -> str:
    return _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def main() -> None:
    for module, names in _KERNELS.items():
        for name in names:
            setattr(module, name, _Compiler(getattr(module, name)))
    _launch_all(ModelConfig("gru", 2, 512, TokenInput(256, 8), 256))
    _launch_all(ModelConfig("gru_reset_after", 1, 1024, TokenInput(256, 8)))
    _launch_all(ModelConfig("lstm", 1, 256, VectorInput(3), 5))
    _launch_all(ModelConfig("gru", 1, 64, TokenInput(256, 8), 256), weight_dtype=torch.float32, deterministic=True)


def _launch_all(
    config: ModelConfig, *, weight_dtype: torch.dtype = torch.bfloat16, deterministic: bool = False
) -> None:
    """Warm up a stepper of this shape for a small and a large bucket."""
    tensors = {name: torch.zeros(shape) for name, shape in config.tensor_shapes().items()}
    info = ModelInfo(
        name="compiled",
        version=1,
        fingerprint=bytes(32),
        cell=config.cell,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        state_size=config.state_size,
        input_kind="tokens" if config.input_size is None else "vectors",
        vocab_size=config.vocab_size,
        input_size=config.input_size,
        output_size=config.output_size,
        gate_names=config.spec.gate_names,
        num_parameters=0,
        device="cpu",
    )

    def capture(launch: Any) -> Any:
        launch()
        return launch

    stepper = make_stepper(
        config,
        tensors,
        info,
        torch.device("cpu"),
        num_slots=4,
        max_batch=1024,
        deterministic=deterministic,
        weight_dtype=weight_dtype,
        capture=capture,
    )
    buckets = stepper._buckets
    stepper._buckets = lambda max_rows: [size for size in buckets(max_rows) if size in (16, 1024)]  # type: ignore[method-assign]
    stepper.warm_up()


if __name__ == "__main__":
    main()
