"""Blocks to staging and back, bit for bit; pages that are not named stay as they were."""

import torch
from hopper import Shipped
from inputs import DEVICE, assert_guards_untouched, guarded_pool, poison_, shape_only

from kernels.gpu.copy_pages import gather_, reference_gather, reference_scatter_, scatter_


def _numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**62), 2**62, shape, generator=generator).to(DEVICE)


def _ids(num_pages: int, num_blocks: int) -> torch.Tensor:
    return torch.randperm(num_pages, generator=torch.Generator().manual_seed(4))[:num_blocks].to(DEVICE)


def check_gathers_blocks_in_order() -> None:
    for num_layers, num_pages, num_words, num_blocks in [
        (1, 1, 1, 1),
        (3, 5, 100, 3),
        (2, 9, 2049, 9),
        (2, 3, 8, 0),
    ]:
        pages, ids = _numbers(num_layers, num_pages, num_words), _ids(num_pages, num_blocks)
        staging = guarded_pool(num_blocks, num_layers, num_words, dtype=torch.int64)
        gather_(pages, ids, staging)
        assert torch.equal(staging, reference_gather(pages, ids))
        assert_guards_untouched(staging)


def check_scatters_blocks_and_leaves_the_other_pages() -> None:
    for num_layers, num_pages, num_words, num_blocks in [(1, 1, 1, 1), (3, 5, 100, 3), (2, 9, 2049, 5)]:
        pool = guarded_pool(num_layers * num_pages, num_words, dtype=torch.int64)
        pages = pool.view(num_layers, num_pages, num_words)
        ids, staging = _ids(num_pages, num_blocks), _numbers(num_blocks, num_layers, num_words)
        expected = torch.empty_like(pages)
        poison_(expected)
        reference_scatter_(expected, ids, staging)
        scatter_(pages, ids, staging)
        assert torch.equal(pages, expected)
        assert_guards_untouched(pool)


def check_layers_may_be_apart() -> None:
    pages, ids = _numbers(4, 6, 32)[::2], _ids(6, 4)
    staging = torch.empty(4, 2, 32, dtype=torch.int64, device=DEVICE)
    gather_(pages, ids, staging)
    assert torch.equal(staging, reference_gather(pages, ids))


def check_staging_may_have_other_words_beside_those_of_pages() -> None:
    pages, ids = _numbers(3, 5, 100), _ids(5, 4)
    wide = guarded_pool(4, 3, 130, dtype=torch.int64)
    expected = wide.clone()
    expected[..., 10:110] = reference_gather(pages, ids)
    gather_(pages, ids, wide[..., 10:110])
    assert torch.equal(wide, expected)
    assert_guards_untouched(wide)
    back = torch.zeros_like(pages)
    scatter_(back, ids, wide[..., 10:110])
    assert torch.equal(back[:, ids], pages[:, ids])


SHIPPED = [
    Shipped(
        name=copy.__name__.strip("_"),
        units=(None,),
        launch=lambda copy=copy: copy(
            shape_only(32, 1024, 8192, dtype=torch.int64),
            shape_only(64, dtype=torch.int64),
            shape_only(64, 32, 8192, dtype=torch.int64),
        ),
    )
    for copy in (gather_, scatter_)
]
