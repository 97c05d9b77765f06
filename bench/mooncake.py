"""The Mooncake traces: when requests came, and the blocks of 512 tokens their prompts consist of."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE_TOKENS = 512
TRACES = ("conversation", "synthetic")


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    at_s: float
    num_prompt_tokens: int
    block_ids: tuple[int, ...]  # equal ids: equal content and equal prefix


def read_trace(path: Path) -> Iterator[TracedRequest]:
    with path.open() as lines:
        for line in lines:
            request = json.loads(line)
            yield TracedRequest(
                at_s=request["timestamp"] / 1000,
                num_prompt_tokens=request["input_length"],
                block_ids=tuple(request["hash_ids"]),
            )
