"""CUDA graphs: what a function gives a GPU to do, kept, and given to it again as one."""

from collections.abc import Callable

import torch

Run = Callable[[], torch.Tensor]
Capture = Callable[[Run], Run]


class GraphCapture:
    """Captures CUDA graphs that share their memory, because only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """`run` as a graph, after once by itself, which compiles its kernels and lets libraries allocate."""
        with torch.cuda.device(self._device):
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
