"""The engine that workers serve with, on the device there is, against the same engine with the formulas, on the CPU.

That those formulas give what the CPU's own engine gives is proven in tests/workers/engine/test_device_engine.py, and
that a pool's copies give the bytes of the CPU's in test_device_kv_pool.py. Here they run on streams.
"""

import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from inputs import BLOCK, DEVICE, IS_INTERPRETED
from noise import FAMILIES, make_model

from kvstore.layout import KvLayout
from workers.engine.device_engine import DeviceModel, device_parts, make_engine
from workers.engine.device_kv_pool import DeviceKvPool
from workers.engine.engine import Engine, LaunchedStep
from workers.engine.engine_parts import OpenedModel
from workers.engine.largest_step import LargestStep
from workers.model.info import ModelInfo, kv_layout
from workers.model.kv_pages import PAGE_DTYPES, KvPages, allocate_pages
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import SampledToken, ScheduledRequest, StepPlan

LENGTHS = (1, 21) if IS_INTERPRETED else (1, 21, 5, 33, 16, 64)
NUM_STEPS = 2 if IS_INTERPRETED else 40
PAGES_EACH, MAX_LEN = 8, 128
NUM_PAGES = PAGES_EACH * len(LENGTHS)


class Likeliest:
    """In place of the CPU's sampler, which needs packages that a bare machine has not."""

    def sample(self, requests: Sequence[Request], logits_SV: torch.Tensor) -> list[SampledToken]:
        return [SampledToken(token_id) for token_id in logits_SV.argmax(-1).tolist()]

    def forget(self, request_id: RequestId) -> None:
        pass


def served(
    family: str, *, device: str, attention: str, quantize: str | None = None, kv_dtype: str = "float32"
) -> DeviceModel:
    model = make_model(family, device=device, quantize=quantize)
    info = ModelInfo(
        fingerprint=b"", vocab_size=model.config.vocab_size, max_model_len=MAX_LEN,
        eos_token_ids=model.eos_token_ids, dtype="float32", layout=kv_layout(model.config, dtype=kv_dtype),
    )  # fmt: skip
    opened = OpenedModel(config=model.config, info=info, sampler=Likeliest(), stop_strings=None)
    index = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return DeviceModel(opened=opened, weights=model.weights, device=index, attention=attention)


def plain_engine(family: str, *, device: str, attention: str, **kinds: str) -> Engine:
    model = served(family, device=device, attention=attention, **kinds)
    return Engine(model.opened, device_parts(model, num_pages=NUM_PAGES))


def new_requests(temperature: float) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            request_id=RequestId(str(number)), session_id=SessionId(0), arrival_s=0.0,
            prompt_token_ids=torch.randint(3, 97, (length,), generator=generator).tolist(),
            sampling=SamplingParams(temperature=temperature, top_k=20, top_p=0.95, seed=number, max_tokens=99),
        )
        for number, length in enumerate(LENGTHS)
    ]  # fmt: skip


def pages_of(number: int) -> tuple[PageId, ...]:
    """In an order of their own."""
    return tuple(PageId(NUM_PAGES - 1 - PAGES_EACH * number - page) for page in range(PAGES_EACH))


def advance(
    engine: Engine, requests: list[Request], *, most: int = 99, on_layer: Callable[[int], None] | None = None
) -> None:
    rows = []
    for number, request in enumerate(requests):
        left = request.num_tokens - request.num_computed_tokens
        rows.append(
            ScheduledRequest(
                request=request, num_computed_tokens=request.num_computed_tokens, num_new_tokens=min(left, most),
                page_ids=pages_of(number), samples=left <= most,
            )
        )  # fmt: skip
    sampled = engine.execute(StepPlan(rows=tuple(rows)), on_layer=on_layer).sampled
    for row in rows:
        row.request.num_computed_tokens += row.num_new_tokens
        if row.samples:
            row.request.output_token_ids.append(sampled[row.request.request_id].token_id)


def answers(engine: Engine, *, temperature: float = 0.0) -> list[list[int]]:
    """A first step with whole prompts and pieces, one where both meet, then decoding."""
    requests = new_requests(temperature)
    advance(engine, requests, most=20)
    for _ in range(NUM_STEPS):
        advance(engine, requests)
    return [request.output_token_ids for request in requests]


def check_answers_of_every_family_are_the_formulas() -> None:
    for family in ("llama_bias",) if IS_INTERPRETED else FAMILIES:
        for temperature in (0.8,) if IS_INTERPRETED else (0.0, 0.8):
            expected = answers(
                plain_engine(family, device="cpu", attention="reference"), temperature=temperature
            )
            got = answers(plain_engine(family, device=DEVICE, attention="triton"), temperature=temperature)
            assert got == expected, (family, temperature)


def check_quantised_experts_give_the_formulas_answers() -> None:
    expected = answers(plain_engine("qwen3_moe_wide", device="cpu", attention="reference", quantize="w4a16"))
    engine = plain_engine("qwen3_moe_wide", device=DEVICE, attention="triton", quantize="w4a16")
    assert answers(engine) == expected


def check_answers_with_pages_of_8_bits_are_nearly_the_formulas() -> None:
    """Nearly: a sum in another order rounds a number of KV to its neighbour, and later tokens follow from that."""
    largest = LargestStep(max_num_seqs=16, max_num_batched_tokens=256)
    for kv_dtype in ("int8",) if IS_INTERPRETED else ("int8", "fp8"):
        expected = answers(plain_engine("qwen3", device="cpu", attention="reference", kv_dtype=kv_dtype))
        engines = [plain_engine("qwen3", device=DEVICE, attention="triton", kv_dtype=kv_dtype)]
        if not IS_INTERPRETED:  # with captured steps
            model = served("qwen3", device=DEVICE, attention="triton", kv_dtype=kv_dtype)
            engines.append(make_engine(model, num_pages=NUM_PAGES, largest=largest))
        for engine in engines:
            got = answers(engine)
            same = sum(ours == theirs for ours, theirs in zip(got, expected, strict=True))
            assert same >= len(LENGTHS) - 1, (kv_dtype, got, expected)


def check_steps_launched_before_the_one_before_is_read_say_the_same() -> None:
    if IS_INTERPRETED:  # nothing runs late there
        return
    model = served("llama_bias", device=DEVICE, attention="triton")
    largest = LargestStep(max_num_seqs=16, max_num_batched_tokens=256)
    for engine in (
        Engine(model.opened, device_parts(model, num_pages=NUM_PAGES)),
        make_engine(model, num_pages=NUM_PAGES, largest=largest),  # with captured steps
    ):
        for temperature in (0.0, 0.8):
            expected = answers(engine, temperature=temperature)
            assert answers_ahead(engine, temperature=temperature) == expected, temperature


def answers_ahead(engine: Engine, *, temperature: float) -> list[list[int]]:
    """As `answers`, but of two decode steps the second is launched before the first is read."""
    requests = new_requests(temperature)
    advance(engine, requests, most=20)
    while any(request.num_tokens - request.num_computed_tokens > 1 for request in requests):
        advance(engine, requests)
    launched: deque[LaunchedStep] = deque()
    while launched or len(requests[0].output_token_ids) < NUM_STEPS + 1:
        rows = tuple(
            ScheduledRequest(
                request=request, num_computed_tokens=request.num_tokens - 1 + len(launched), num_new_tokens=1,
                page_ids=pages_of(number), samples=True,
            )
            for number, request in enumerate(requests)
        )  # fmt: skip
        if len(requests[0].output_token_ids) + len(launched) < NUM_STEPS + 1:
            launched.append(engine.launch(StepPlan(rows=rows)))
            if len(launched) == 1:
                continue
        sampled = launched.popleft().result().sampled
        for request in requests:
            request.output_token_ids.append(sampled[request.request_id].token_id)
    return [request.output_token_ids for request in requests]


def check_a_prompt_handed_over_layer_by_layer_goes_on_there() -> None:
    """Each layer is copied when it is announced, by another thread, while the step goes on."""
    if IS_INTERPRETED:  # no streams, so nothing that is not tested faster elsewhere
        return
    source, target, alone = (plain_engine("qwen3", device=DEVICE, attention="triton") for _ in range(3))
    expected = answers(alone)
    here = new_requests(0.0)
    advance(source, here, most=20)
    copies: list[threading.Thread] = []

    def copy(layer: int) -> None:
        blocks = bytearray(NUM_PAGES * source.model.layout.layer_block_bytes)
        source.kv_pool.read(layer=layer, page_ids=range(NUM_PAGES), into=memoryview(blocks))
        target.kv_pool.write(layer=layer, page_ids=range(NUM_PAGES), data=memoryview(blocks))

    def on_layer(layer: int) -> None:
        copies.append(threading.Thread(target=copy, args=(layer,)))
        copies[-1].start()

    advance(source, here, on_layer=on_layer)
    assert len(copies) == source.model.layout.num_layers
    for thread in copies:
        thread.join()
    for _ in range(NUM_STEPS - 1):
        advance(target, here)
    assert [request.output_token_ids for request in here] == expected


def check_blocks_move_beside_steps_and_neither_disturbs_the_other() -> None:
    if IS_INTERPRETED:  # as above
        return
    model = served("qwen3", device=DEVICE, attention="triton")
    engine = Engine(model.opened, device_parts(model, num_pages=2 * NUM_PAGES))
    pool, spare = engine.kv_pool, range(NUM_PAGES, 2 * NUM_PAGES)
    block_bytes = pool.layout.block_bytes
    arena_SX = torch.randint(0, 255, (2 * len(spare), block_bytes), dtype=torch.uint8, pin_memory=True)
    lasts, wrong = threading.Event(), []

    def move() -> None:
        while not lasts.is_set():
            arena_SX[len(spare) :] = 0
            pool.load(spare, arena_SX, range(len(spare)))
            pool.save(spare, arena_SX, range(len(spare), 2 * len(spare)))
            wrong.append(not torch.equal(arena_SX[: len(spare)], arena_SX[len(spare) :]))

    mover = threading.Thread(target=move)
    mover.start()
    try:
        got = [answers(engine) for _ in range(3)]
    finally:
        lasts.set()
        mover.join()
    assert not any(wrong), f"{sum(wrong)} of {len(wrong)} rounds brought back other bytes"
    assert got == [answers(plain_engine("qwen3", device=DEVICE, attention="triton"))] * 3


def check_pages_and_arenas_hold_the_bytes_that_the_formulas_move() -> None:
    config = make_model("qwen3", device="cpu").config
    for dtype in ("bfloat16", "int8"):
        pages = allocate_pages(
            config, num_pages=9, block=BLOCK, dtype=PAGE_DTYPES[dtype], device=torch.device("cpu")
        )
        for part in (pages.pages_LP2GBC, pages.scales_LP2GB):
            if part is not None:
                part.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
        found = [moved(kv_layout(config, dtype=dtype), pages, where) for where in (DEVICE, "cpu")]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True)), dtype


def moved(layout: KvLayout, pages: KvPages, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Seven blocks after some copies, and then all nine."""
    scales = pages.scales_LP2GB
    pool = DeviceKvPool(
        layout,
        KvPages(
            pages_LP2GBC=pages.pages_LP2GBC.clone().to(device),
            scales_LP2GB=None if scales is None else scales.clone().to(device),
        ),
        num_pages=9,
        staging_bytes=3 * layout.block_bytes,  # so that seven blocks go in pieces
    )
    page_ids, slots = [8, 0, 3, 1, 7, 2, 5], [6, 5, 0, 1, 2, 4, 3]
    arena_SX = torch.zeros(7, layout.block_bytes, dtype=torch.uint8)
    layer = bytearray(7 * layout.layer_block_bytes)
    pool.save(page_ids, arena_SX, slots)
    pool.load(slots, arena_SX, range(7))
    pool.read(layer=1, page_ids=page_ids, into=memoryview(layer))
    pool.write(layer=0, page_ids=page_ids[::-1], data=memoryview(layer))
    after_SX = torch.zeros(9, layout.block_bytes, dtype=torch.uint8)
    pool.save(range(9), after_SX, range(9))
    return arena_SX, after_SX


def check_a_workers_engine_takes_the_memory_there_is_and_captures_its_steps() -> None:
    if IS_INTERPRETED:
        return
    gc.collect()  # engines of other checks hold each other's parts
    torch.cuda.empty_cache()
    model = served("llama_bias", device=DEVICE, attention="triton")
    engine = make_engine(
        model, num_pages=None, largest=LargestStep(max_num_seqs=16, max_num_batched_tokens=256)
    )
    for temperature in (0.0, 0.8):  # with captured steps, as workers run
        expected = answers(
            plain_engine("llama_bias", device=DEVICE, attention="triton"), temperature=temperature
        )
        assert answers(engine, temperature=temperature) == expected, temperature
    free, total = torch.cuda.mem_get_info()
    assert 0.85 <= (total - free) / total <= 0.92, (free, total, engine.kv_pool.num_pages)
