"""A GPU's limits, and how near the kernels and the engine come to them.

    python3 -m bench.gpu [--quick]

Runs under any Python with torch and triton, and nothing of Penstock installed: `make gpu`.
"""

import argparse
import gc
import sys

import torch

from bench.gpu_limits import measure_limits
from bench.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="keep no result")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch finds none here")
    from bench import gpu_engine, gpu_kernels, gpu_peers  # need triton

    limits = measure_limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"copy bandwidth {limits.copy_gb_s:8.0f} GB/s")
    print(f"bf16 matrix    {limits.matrix_tflop_s:8.0f} TFLOP/s")
    claims = gpu_kernels.measure(limits) + gpu_engine.measure(limits)
    gc.collect()  # captured graphs hold the engine that they belong to
    torch.cuda.empty_cache()
    gpu_peers.print_transformers()
    write_report("gpu", claims, keep=not quick, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
