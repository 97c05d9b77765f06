"""`python -m workers.profile_kv`: learns how a model's KV is distributed, for the codec.

    python -m workers.profile_kv --model-path models/demo --text sample.txt

The model reads the text, or the language reference that every Python ships, in windows; what is learnt goes into
kv_profile.safetensors beside the weights. A profile is of one model computed in one dtype, quantized or not: its
fingerprint says so.
"""

import argparse
import os
import pydoc_data.topics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kvstore.codec.profile import load_profile, make_profile
from kvstore.layout import WHOLE_DTYPES
from workers.engine.engine import Engine, load_engine
from workers.errors import CheckpointError
from workers.model.checkpoint import PROFILE_FILE
from workers.model.info import load_model_info
from workers.model.quantized_checkpoint import open_checkpoint
from workers.quantization import CPU_QUANTIZATIONS
from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest, StepPlan

WINDOW_TOKENS = 2048  # longer ones teach what keys look like far from the start


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 for a model or a text that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.profile_kv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--text", type=Path, help="UTF-8 text like what the model will read")
    parser.add_argument(
        "--dtype", choices=sorted(WHOLE_DTYPES), default="float32", help="what workers compute in"
    )
    parser.add_argument(
        "--quantize", choices=CPU_QUANTIZATIONS, default="none", help="how workers keep the weights"
    )
    parser.add_argument("--max-tokens", type=int, default=32_768, help="how much of the text to read")
    parser.add_argument(
        "--key-factors",
        type=_numbers,
        default=(),
        help="bins of each layer's keys against the usual: 1,0.25,1,1",
    )
    given = parser.parse_args(arguments)
    done = "Replaced" if (given.model_path / PROFILE_FILE).exists() else "Wrote"
    try:
        text = given.text.read_text(encoding="utf-8") if given.text else _reference_text()
        path, bits = profile(
            given.model_path,
            text,
            dtype=given.dtype,
            quantize=given.quantize,
            max_tokens=given.max_tokens,
            key_factors=given.key_factors,
        )
    except (CheckpointError, OSError, ValueError) as error:
        print(f"profile-kv: {error}", file=sys.stderr)
        return 2
    levels = ", ".join(f"cachegen-{number} {one:.2f}" for number, one in enumerate(bits, start=1))
    print(f"{done} {path} ({path.stat().st_size / 2**20:.1f} MiB). Bits per value: {levels}.")
    return 0


def profile(
    model_path: Path,
    text: str,
    *,
    dtype: str,
    quantize: str = "none",
    max_tokens: int,
    key_factors: Sequence[float] = (),
) -> tuple[Path, tuple[float, ...]]:
    """Writes the profile; returns where it is, and how many bits a value takes at each level.

    Raises CheckpointError for a model, ValueError for a text that cannot be used.
    """
    info = load_model_info(
        model_path, open_checkpoint(model_path), dtype=dtype, quantize=quantize, max_model_len=None
    )
    tokenizer = Tokenizer.from_str((model_path / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    block = info.layout.block_size_tokens
    window = min(WINDOW_TOKENS, info.max_model_len // block * block)
    tokens = tokens[: min(max_tokens, len(tokens)) // block * block]
    if not tokens:
        raise ValueError(f"the text has less than one block of {block} tokens")
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    engine = load_engine(
        model_path=model_path,
        dtype=dtype,
        quantize=quantize,
        num_pages=len(tokens) // block,
        num_threads=len(os.sched_getaffinity(0)),
    )
    arena_SX = np.empty((len(tokens) // block, info.layout.block_bytes), np.uint8)
    runs = _compute(engine, windows, arena_SX)
    content = make_profile(
        arena_SX, runs, fingerprint=info.fingerprint, layout=info.layout, key_factors=key_factors
    )
    path = model_path / PROFILE_FILE
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    made = load_profile(path, fingerprint=info.fingerprint, layout=info.layout)
    assert made is not None
    return path, made.bits_per_level


def _compute(engine: Engine, windows: Sequence[list[int]], arena_SX: np.ndarray) -> list[range]:
    """The KV of each window into blocks of the arena; returns which."""
    runs: list[range] = []
    start = 0
    for window in windows:
        run = range(start, start + len(window) // engine.model.layout.block_size_tokens)
        engine.execute(StepPlan(rows=(_row(window, run),)))
        engine.kv_pool.save(run, arena_SX, run)
        runs.append(run)
        start = run.stop
    return runs


def _row(token_ids: list[int], pages: range) -> ScheduledRequest:
    request = Request(
        request_id=RequestId("profile"), session_id=SessionId(0), prompt_token_ids=token_ids,
        sampling=SamplingParams(), arrival_s=0.0,
    )  # fmt: skip
    return ScheduledRequest(
        request=request,
        num_computed_tokens=0,
        num_new_tokens=len(token_ids),
        page_ids=tuple(PageId(page) for page in pages),
        samples=False,
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _reference_text() -> str:
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


if __name__ == "__main__":
    sys.exit(main())
