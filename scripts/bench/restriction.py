"""Let an AVX-512 machine stand in for an AVX2 one."""

import os
import sys

# Read by the libraries when they are loaded, so the script starts itself again with them.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MONO_QUANT_ISA": "avx2",
    # memcpy and its like
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ",
}
_MARK = "MONO_QUANT_BENCHMARK_CPU"
# What was seen on a Zen 4 with AVX512-VNNI, variable by variable.
NOTE = """\
restricted to AVX2, each variable seen to work: torch (ATEN_CPU_CAPABILITY), oneDNN in torch and in openvino (ONEDNN_MAX_CPU_ISA:
int8 products saturate as without VNNI), FBGEMM (FBGEMM_ENABLE_INSTRUCTIONS: saturates), mono_quant (MONO_QUANT_ISA).
MKL: MKL_ENABLE_INSTRUCTIONS is set, but has no effect on AMD, where MKL never touches 512-bit registers in any case.
openvino: dynamic quantization is switched off, as it is on a CPU without VNNI; its own small kernels may still use AVX-512.
onnxruntime cannot be restricted: it reads CPUID itself and keeps VNNI, which flatters its speed and its accuracy.
torchao-dynamic: torch._int_mm also asks CPUID, and here ends in oneDNN's AVX2 product, fast but inexact; on a CPU without VNNI
it is a scalar loop, 10 to 25 times slower than fp32."""


def restrict(cpu: str | None) -> None:
    """Start the script again with the environment that restricts its libraries, unless that has been done."""
    if cpu is None or os.environ.get(_MARK) == cpu:
        return
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2, _MARK: cpu})


def restricted() -> bool:
    """Say whether this process runs under `--cpu avx2`."""
    return os.environ.get(_MARK) == "avx2"
