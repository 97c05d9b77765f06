"""The fastest tilings of the GPU's kernels on this device, for the tables in their files.

    python3 -m bench.gpu_tune

Candidates that do not fit are left out. Prints the best three of each table's entries with what the present one takes;
writing the winner into the table is left to whoever commits it with the device's name.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench import gpu_kernels
from bench.gpu_limits import median_ms
from kernels.gpu import (
    grouped_quantized_matmul,
    paged_attention,
    prefill_attention,
    quantized_linear,
    shared_prefix_attention,
)
from kernels.gpu.tiling import Tiling


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    name: str
    tilings: dict[
        Any, Tiling
    ]  # the operation's own table, which candidates are put into for as long as they run
    key: object
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stages: tuple[int, ...] = (3, 5)  # 4 is as 3 where page ids are read first
    run: Callable[[], object]

    def candidates(self) -> Iterator[Tiling]:
        for rows, columns, num_warps, num_stages in itertools.product(
            self.rows, self.columns, (4, 8), self.stages
        ):
            yield Tiling(rows=rows, columns=columns, num_warps=num_warps, num_stages=num_stages)


def tuned() -> Iterator[Tuned]:
    for num_bytes, dtype in ((2, torch.bfloat16), (1, torch.int8)):
        yield Tuned(
            name=f"paged_attention, {dtype}", tilings=paged_attention.TILINGS, key=num_bytes,
            rows=(16, 64), columns=(32, 64, 128), run=gpu_kernels.decode(32, 8192, dtype),
        )  # fmt: skip
        yield Tuned(
            name=f"prefill_attention, {dtype}", tilings=prefill_attention.TILINGS, key=num_bytes,
            rows=(64, 128), columns=(32, 64, 128), run=gpu_kernels.prefill(8192, dtype),
        )  # fmt: skip
        yield Tuned(
            name=f"shared_prefix_attention, {dtype}", tilings=shared_prefix_attention.TILINGS, key=num_bytes,
            rows=(64, 128), columns=(32, 64, 128), run=gpu_kernels.shared_prefix(32, 2048, 128, dtype),
        )  # fmt: skip
    for kind in ("int8", "fp8"):
        for is_few, num_tokens in ((True, 1), (False, 2048)):
            yield Tuned(
                name=f"quantized_linear, {kind}, {num_tokens} tokens", tilings=quantized_linear.TILINGS,
                key=is_few, rows=(64, 128), columns=(16,) if is_few else (64, 128, 256), stages=(3, 4, 5),
                run=gpu_kernels.linear(num_tokens, kind),
            )  # fmt: skip
    for rows_each, num_tokens in ((16, 64), (128, 4096)):
        yield Tuned(
            name=f"grouped_quantized_matmul, int8, {num_tokens} tokens",
            tilings=grouped_quantized_matmul.TILINGS, key=rows_each, rows=(64, 128), columns=(rows_each,),
            stages=(3, 4, 5), run=gpu_kernels.experts(num_tokens, "int8"),
        )  # fmt: skip


def tune(tuned: Tuned) -> None:
    present, times = tuned.tilings[tuned.key], {}
    for candidate in {present, *tuned.candidates()}:
        tuned.tilings[tuned.key] = candidate
        try:
            times[candidate] = median_ms(tuned.run)
        except OutOfResources:
            continue
    tuned.tilings[tuned.key] = present
    print(f"{tuned.name}: now {times[present]:.4f} ms")
    for candidate in sorted(times, key=times.__getitem__)[:3]:
        print(f"    {times[candidate]:.4f} ms  {candidate}")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench.gpu_tune needs a CUDA device, and torch finds none here")
    print(torch.cuda.get_device_name())
    for entry in tuned():
        tune(entry)


if __name__ == "__main__":
    main()
