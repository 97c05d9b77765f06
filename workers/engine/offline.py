"""Answers a batch of prompts on this machine, without a server.

    python3 -m workers.engine.offline MODEL --prompt-ids 5,9,33 [--prompt-ids ...] [--device cuda] [--max-tokens 64]
    python3 -m workers.engine.offline MODEL --prompts FILE

MODEL is a checkpoint directory in the Hugging Face format. FILE has a prompt a line, each a JSON list of token ids or
a JSON string, which needs the package `tokenizers` and MODEL/tokenizer.json. One JSON line for each prompt, in order;
how long it took goes to standard error. On a GPU it needs torch and Triton, and nothing else.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.compute_device import ComputeDevice
from workers.engine.offline_engine import Generation, build_engine, load_model
from workers.engine.offline_settings import OfflineSettings
from workers.errors import CheckpointError, InvalidRequest
from workers.quantization import KV_DTYPES, QUANTIZATIONS
from workers.request import SamplingParams


def main(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    try:
        tokenizer = _Tokenizer(given.model)
        prompts = _prompts(given, tokenizer)
        start_s = time.perf_counter()
        settings = _settings(given)
        engine = build_engine(load_model(given.model, settings, on_progress=lambda share: None), settings)
        loaded_s = time.perf_counter()
        generations = engine.generate(
            (prompt, _sampling(given, number)) for number, prompt in enumerate(prompts)
        )
    except (CheckpointError, InvalidRequest, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    done_s = time.perf_counter()
    for number, generation in enumerate(generations):
        print(json.dumps(_line(number, generation, tokenizer)))
    num_tokens = sum(len(generation.output_token_ids) for generation in generations)
    print(
        f"{engine.engine.kv_pool.num_pages} pages; loaded in {loaded_s - start_s:.1f} s;"
        f" {len(generations)} prompts, {num_tokens} tokens in {done_s - loaded_s:.2f} s",
        file=sys.stderr,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = OfflineSettings()
    parser = argparse.ArgumentParser(
        prog="python3 -m workers.engine.offline", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt-ids", action="append", metavar="ID,ID,...")
    source.add_argument("--prompts", type=Path, metavar="FILE")
    parser.add_argument("--device", default=defaults.compute.device, help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--attention", help="numba, triton or reference: the kernels, by default the device's"
    )
    parser.add_argument("--dtype", help="of weights: float32 or bfloat16")
    parser.add_argument(
        "--quantize", default=defaults.quantize, help=f"weights of the layers: {', '.join(QUANTIZATIONS)}"
    )
    parser.add_argument("--kv-dtype", default=defaults.kv_dtype, help=f"of pages: {', '.join(KV_DTYPES)}")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--num-pages", type=int, help="of 16 tokens; by default what fits")
    parser.add_argument(
        "--max-num-seqs", type=int, default=defaults.max_num_seqs, help="answers at the same time"
    )
    parser.add_argument(
        "--max-num-batched-tokens", type=int, default=defaults.max_num_batched_tokens, help="of a step"
    )
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next has the next")
    parser.add_argument("--ignore-eos", action="store_true")
    return parser


def _settings(given: argparse.Namespace) -> OfflineSettings:
    return OfflineSettings(
        compute=ComputeDevice(device=given.device, attention=given.attention), dtype=given.dtype,
        quantize=given.quantize, kv_dtype=given.kv_dtype, max_model_len=given.max_model_len,
        max_num_seqs=given.max_num_seqs, max_num_batched_tokens=given.max_num_batched_tokens,
        num_pages=given.num_pages,
    )  # fmt: skip


def _sampling(given: argparse.Namespace, number: int) -> SamplingParams:
    return SamplingParams(
        temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, seed=given.seed + number,
        max_tokens=given.max_tokens, ignore_eos=given.ignore_eos,
    )  # fmt: skip


class _Tokenizer:
    """Loaded at the first text."""

    def __init__(self, model_path: Path) -> None:
        self._path = model_path / "tokenizer.json"
        self._tokenizer: Any = None

    @property
    def is_loaded(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as e:
                raise ValueError("prompts of text need the package tokenizers; give token ids") from e
            self._tokenizer = Tokenizer.from_file(str(self._path))
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids)
        return text


def _prompts(given: argparse.Namespace, tokenizer: _Tokenizer) -> list[list[int]]:
    if given.prompt_ids is not None:
        return [[int(token_id) for token_id in ids.split(",")] for ids in given.prompt_ids]
    lines = [line for line in given.prompts.read_text().splitlines() if line.strip()]
    return [_prompt(json.loads(line), tokenizer) for line in lines]


def _prompt(value: object, tokenizer: _Tokenizer) -> list[int]:
    match value:
        case str():
            return tokenizer.encode(value)
        case list() if all(type(token_id) is int for token_id in value):  # true is none
            return value
        case _:
            raise ValueError(f"a prompt is a JSON list of token ids or a string, got {value!r}")


def _line(number: int, generation: Generation, tokenizer: _Tokenizer) -> dict[str, object]:
    assert generation.finish_reason is not None
    line: dict[str, object] = {
        "prompt": number,
        "token_ids": generation.output_token_ids,
        "finish_reason": generation.finish_reason.value,
    }
    return line | {"text": tokenizer.decode(generation.output_token_ids)} if tokenizer.is_loaded else line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
