"""Pages as words that are copied: blocks between all layers' pages and staging, with their scales where there are any.

L layers, P pages, N blocks, W words of 8 bytes: in staging of a layer of a block, all there are of it.
"""

from collections.abc import Iterator, Sequence

import torch

from kernels.gpu import copy_pages
from workers.engine.device_copies import to_device
from workers.model.kv_pages import KvPages


class PageWords:
    def __init__(self, pages: KvPages) -> None:
        self._device = pages.pages_LP2GBC.device
        parts = (
            [pages.pages_LP2GBC] if pages.scales_LP2GB is None else [pages.pages_LP2GBC, pages.scales_LP2GB]
        )
        self._parts_LPW = [part.flatten(2).view(torch.int64) for part in parts]

    def gather_(self, layers: slice, page_ids: Sequence[int], staging_NLW: torch.Tensor) -> None:
        """Fills staging with these layers of the blocks in `page_ids`."""
        ids_N = self._ids(page_ids)
        for words_LPW, part_NLW in self._parts(layers, staging_NLW):
            if self._device.type == "cuda":
                copy_pages.gather_(words_LPW, ids_N, part_NLW)
            else:
                part_NLW.copy_(copy_pages.reference_gather(words_LPW, ids_N))

    def scatter_(self, layers: slice, page_ids: Sequence[int], staging_NLW: torch.Tensor) -> None:
        """Fills these layers of the pages, which all differ, with the blocks in staging."""
        ids_N = self._ids(page_ids)
        scatter_ = copy_pages.scatter_ if self._device.type == "cuda" else copy_pages.reference_scatter_
        for words_LPW, part_NLW in self._parts(layers, staging_NLW):
            scatter_(words_LPW, ids_N, part_NLW)

    def _parts(self, layers: slice, staging_NLW: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Numbers, then scales, and where in staging they lie."""
        start = 0
        for words_LPW in self._parts_LPW:
            stop = start + words_LPW.shape[2]
            yield words_LPW[layers], staging_NLW[..., start:stop]
            start = stop

    def _ids(self, page_ids: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(page_ids, dtype=torch.int64), self._device)
