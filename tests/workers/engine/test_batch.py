"""Plans as arrays: token order, positions, slots, and a page table that follows changes."""

import pytest

from workers.engine.batch import BatchBuilder
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest


def row(
    name: str, *, start: int, count: int, pages: tuple[int, ...], samples: bool = True
) -> ScheduledRequest:
    """`count` tokens of a request whose token at position p is 100 * (its letter) + p; the prompt has 20."""
    base = 100 * (ord(name) - ord("a"))
    request = Request(
        request_id=RequestId(name), session_id=SessionId(0), prompt_token_ids=[base + p for p in range(20)],
        output_token_ids=[base + p for p in range(20, 40)], sampling=SamplingParams(), arrival_s=0.0,
    )  # fmt: skip
    return ScheduledRequest(
        request=request, num_computed_tokens=start, num_new_tokens=count,
        page_ids=tuple(PageId(page) for page in pages), samples=samples,
    )  # fmt: skip


@pytest.fixture
def builder() -> BatchBuilder:
    return BatchBuilder(block_size_tokens=16, max_pages_per_request=4)


def test_single_tokens_come_first_and_chunks_after(builder: BatchBuilder) -> None:
    rows = [
        row("a", start=14, count=4, pages=(7, 2), samples=False),
        row("b", start=33, count=1, pages=(5, 1, 9)),
        row("c", start=0, count=2, pages=(3,)),
    ]
    batch, sampling = builder.build(rows)
    assert batch.token_ids_T.tolist() == [133, 14, 15, 16, 17, 200, 201]
    assert batch.positions_T.tolist() == [33, 14, 15, 16, 17, 0, 1]
    assert batch.slots_T.tolist() == [9 * 16 + 1, 7 * 16 + 14, 7 * 16 + 15, 32, 33, 48, 49]
    assert batch.rows_T.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert batch.num_singles == 1
    assert [(chunk.start, chunk.stop, chunk.num_prefix) for chunk in batch.chunks] == [(1, 5, 14), (5, 7, 0)]
    assert [chunk.pages[:2].tolist() for chunk in batch.chunks] == [[7, 2], [3, 0]]
    assert batch.sampled_S.tolist() == [0, 6]
    assert [sampled.request.request_id for sampled in sampling] == ["b", "c"]


def test_a_chunk_may_cross_from_prompt_to_output(builder: BatchBuilder) -> None:
    batch, _ = builder.build([row("b", start=18, count=4, pages=(1, 0))])
    assert batch.token_ids_T.tolist() == [118, 119, 120, 121]


def test_the_table_follows_requests_that_grow_move_and_lose_their_pages(builder: BatchBuilder) -> None:
    builder.build([row("a", start=31, count=1, pages=(4, 6)), row("b", start=3, count=1, pages=(8,))])
    batch, _ = builder.build(
        [row("b", start=4, count=1, pages=(8,)), row("a", start=32, count=1, pages=(4, 6, 2))]
    )
    assert batch.table_RL[0, 0] == 8
    assert batch.table_RL[1, :3].tolist() == [4, 6, 2]
    assert batch.slots_T.tolist() == [8 * 16 + 4, 2 * 16]
    batch, _ = builder.build([row("a", start=20, count=1, pages=(5, 3))])
    assert batch.slots_T.tolist() == [3 * 16 + 4]


def test_more_rows_than_ever_before_fit(builder: BatchBuilder) -> None:
    names = [chr(ord("a") + number) for number in range(26)]
    rows = [row(name, start=number, count=1, pages=(number, 30)) for number, name in enumerate(names)]
    batch, sampling = builder.build(rows)
    assert batch.slots_T.tolist() == [
        16 * (number if number < 16 else 30) + number % 16 for number in range(26)
    ]
    assert len(sampling) == 26
