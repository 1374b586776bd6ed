"""What this machine can do: bfloat16, a compiler, and how many floating-point operations a second in a matrix product.

The peak is measured, not looked up: a share of it then says how much of *this* machine a run uses, whatever
else is running on it and whatever its data sheet promises.
"""

import importlib.util
import os
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fathom.config.recipe import Precision, TrainSection
from fathom.errors import UserError

GEMM_SIZE = 2048
"""Side of the square matrices of the measurement: large enough for the peak, 50 MB in float32."""
MEASURE_SECONDS = 1.0
UNDISTURBED = 0.8
"""Share of its cores, and of its own fastest product, below which a measurement counts as disturbed."""


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_bf16() -> bool:
    """Whether bfloat16 products are fast here: an accelerator, or a CPU with AVX-512 BF16 or AMX (others emulate)."""
    if device().type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def has_compiler() -> bool:
    """Whether `torch.compile` can build kernels here: a C++ compiler and Python's headers, or Triton for a GPU."""
    if device().type != "cpu":
        return importlib.util.find_spec("triton") is not None
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.exists() and any(shutil.which(name) for name in names)


def resolved_precision(precision: Precision) -> Precision:
    """`train.precision` without `auto`, which is bf16 where that is fast."""
    return ("bf16" if has_bf16() else "fp32") if precision == "auto" else precision


def use_bf16(precision: Precision) -> bool:
    """Whether activations are bfloat16 at this `train.precision`."""
    return resolved_precision(precision) != "fp32"


def use_compiler(train: TrainSection) -> bool:
    """What `train.compile` means here. Raises `UserError` for `on` without a compiler.

    Layers in FP8, and layers that are to keep less, decide themselves what is kept for the backward pass; compiled, the
    compiler would.
    """
    if train.compile == "on" and not has_compiler():
        raise UserError(
            "train.compile is on, but there is no compiler here (g++ or clang++, and Python's headers); "
            "install one, or set it to auto"
        )
    if train.precision == "fp8" or train.recompute:
        return False
    return has_compiler() if train.compile == "auto" else train.compile == "on"


@dataclass(frozen=True)
class GemmSpeed:
    """A second of matrix products, in FLOP/s."""

    peak: float
    """Of the fastest product."""
    sustained: float
    """Of the whole second."""
    cores: float
    """Share of its threads' time that this process was given; 1 on an accelerator."""

    @property
    def busy(self) -> bool:
        """Whether others were using the machine, so that all of these are too low or too scattered to rely on."""
        return min(self.sustained / self.peak, self.cores) < UNDISTURBED

    @property
    def undisturbed(self) -> float:
        """What the peak would be if the process had its cores to itself: the best guess of a busy machine."""
        return self.peak / self.cores


def measure_gemm_peak(dtype: torch.dtype) -> float:
    """The best rate of a 2048³ matrix product in `dtype` within about a second, in FLOP/s."""
    return measure_gemm(dtype).peak


def measure_gemm(dtype: torch.dtype) -> GemmSpeed:
    """The rate of 2048³ matrix products in `dtype` over about a second."""
    where = device()
    a = torch.randn(GEMM_SIZE, GEMM_SIZE, generator=torch.Generator().manual_seed(0)).to(where, dtype)
    out = a @ a  # the first product also builds and caches the kernel
    fastest, products = float("inf"), 0
    began, began_cpu = time.perf_counter(), time.process_time()
    while (start := time.perf_counter()) < began + MEASURE_SECONDS:
        torch.matmul(a, a, out=out)
        if where.type != "cpu":
            torch.accelerator.synchronize()
        fastest, products = min(fastest, time.perf_counter() - start), products + 1
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    flop = 2 * GEMM_SIZE**3
    cores = min(cpu_seconds / (seconds * torch.get_num_threads()), 1.0) if where.type == "cpu" else 1.0
    return GemmSpeed(peak=flop / fastest, sustained=flop * products / seconds, cores=cores)
