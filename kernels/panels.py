"""fp32 weights in the order in which `kernels.panel_tile` reads them: panels of outputs, in each input after input.

N outputs, K inputs, E experts, J panels of P outputs: panels_EJKP[e, j, k, p] = w_e[j P + p, k], and 0 beyond N.
Packed while they are loaded, so there are never two copies of a model. Xeon, two threads: 5 GB/s.
"""

import torch
from numba import carray, cfunc, int64

from kernels import huge_pages
from kernels.packed_weights import PackedWeights
from kernels.panel_tile import PANEL
from kernels.team import TASK, Program, Step, bind, claim, floats

_LINE = 16  # floats


class Panels(PackedWeights):
    """The weights of one product, or of several of one shape (experts), one after the other."""

    def __init__(self, num_outputs: int, depth: int, *, num_experts: int = 1) -> None:
        """Zero until `put`."""
        super().__init__(num_outputs, depth, num_experts=num_experts)
        self.panels_EJKP = huge_pages.zeros(num_experts, -(-num_outputs // PANEL), depth, PANEL)

    def put(self, w_NK: torch.Tensor, *, start: int = 0, expert: int = 0) -> None:
        """Takes rows as outputs `start` and those after it."""
        self.check_rows(w_NK, start=start)
        num_rows, depth = w_NK.shape
        step = Step()
        step.fill(num_rows)
        w_NK = w_NK.float().contiguous()
        Program([bind(_put_task.address, step, w_NK, self.panels_EJKP[expert], depth, num_rows, start)]).run()

    def __getitem__(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Rows [T, K] as they were put: where the embedding is the output matrix, both are this one copy."""
        return self.panels_EJKP[0, rows_T // PANEL, :, rows_T % PANEL]


@cfunc(TASK, cache=True)
def _put_task(data):
    a = carray(data, (7,), int64)  # counter, step, w, panels, K, N, first output
    depth, num_rows, start = a[4], a[5], a[6]
    while True:
        panel = start // PANEL + claim(data)
        first, last = max(panel * PANEL, start), min((panel + 1) * PANEL, start + num_rows)
        if first >= last:
            return
        target_X = floats(a[3] + 4 * panel * PANEL * depth, PANEL * depth)
        source_X = floats(a[2] + 4 * (first - start) * depth, (last - first) * depth)
        offset = first - panel * PANEL
        # A cache line of each row at a time: rows that lie a page apart keep only few lines in L1.
        for block in range(0, depth, _LINE):
            for row in range(last - first):
                for k in range(block, min(block + _LINE, depth)):
                    target_X[k * PANEL + offset + row] = source_X[row * depth + k]
