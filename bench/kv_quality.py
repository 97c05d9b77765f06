"""What lossy KV costs: a context's blocks go through a codec, what follows is computed exactly on top of them.

That is what happens to a prefix that was loaded. Text: the tokens after CONTEXT_TOKENS of a held-out document's window.
Recall: all full blocks of the prompt are lossy; right means the whole answer, as in `tools.demo_eval`.

The shipped profile's key factors were chosen on other held-out problems and windows (seeds `recall:...` and 0).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from kvstore.codec.quantize import Bytes
from tools.demo_corpus import load_documents
from tools.demo_eval import recall_problem
from tools.demo_rows import Encoder
from workers.engine.backends import BACKENDS
from workers.engine.kv_pool import KvPool
from workers.model.checkpoint import Checkpoint
from workers.model.config import load_config
from workers.model.cpu_operations import cpu_transformer
from workers.model.cpu_weights import load_cpu_weights
from workers.model.info import ModelInfo, load_model_info
from workers.model.kv_pages import KvPages
from workers.model.token_batch import Chunk, ChunkBounds, TokenBatch
from workers.model.weights import load_weights
from workers.quantization import GPU_QUANTIZATIONS

CONTEXT_TOKENS = 512
FOLLOWING_TOKENS = 256
MAX_TOKENS = 4096
# Replaces the blocks in these slots of an arena by what a codec makes of them.
Distort = Callable[[Bytes, range], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Tokens and the KV of the blocks before `num_context`; `scored` are the places whose token is to be predicted."""

    tokens: list[int]
    num_context: int
    scored: list[int]
    blocks: Bytes


class Model:
    """The shipped model with all logits that one asks for: in float32 or int8 as a CPU computes it, or in a GPU's
    quantizations by the formulas of its kernels."""

    def __init__(self, model_path: Path, *, quantize: str = "none") -> None:
        config, checkpoint = load_config(model_path), Checkpoint(model_path)
        self.info: ModelInfo = load_model_info(
            model_path, checkpoint, dtype="float32", quantize=quantize, max_model_len=None
        )
        self.encoder = Encoder(Tokenizer.from_file(str(model_path / "tokenizer.json")))
        self._block = self.info.layout.block_size_tokens
        self._pool = KvPool(self.info.layout, num_pages=MAX_TOKENS // self._block)
        pages_LP2GBC = self._pool.pages_LP2GBC
        if quantize in GPU_QUANTIZATIONS:
            # Needs triton, which serving on a CPU has not.
            from workers.model.stored_products import products_of

            stored = products_of(checkpoint, quantize)
            weights = load_weights(checkpoint, config, dtype=torch.float32, stored=stored)
            pages = KvPages(pages_LP2GBC=pages_LP2GBC, scales_LP2GB=None)
            backend = BACKENDS["reference"](config, weights, pages, self.info.max_model_len)
            self._transformer = backend.transformer
        else:
            weights = load_cpu_weights(checkpoint, config, dtype=torch.float32, quantize=quantize)
            self._transformer = cpu_transformer(
                config, weights, pages_LP2GBC=pages_LP2GBC, max_model_len=self.info.max_model_len
            )

    def logits(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        """Of every token of a text, [1, T, V]."""
        tokens: list[int] = tokens_1T[0].tolist()
        return self._forward(tokens, 0, len(tokens), wanted=range(len(tokens)))[None]

    def text_samples(self, *, num_samples: int) -> list[Sample]:
        tokens = self.encoder.documents(load_documents(held_out=True)).tolist()
        size = CONTEXT_TOKENS + FOLLOWING_TOKENS
        starts = list(range(size // 2, len(tokens) - size, size))
        scored = list(range(CONTEXT_TOKENS + 1, size))
        return [
            self._sample(tokens[start : start + size], num_context=CONTEXT_TOKENS, scored=scored)
            for start in Random(1).sample(starts, min(num_samples, len(starts)))
        ]

    def recall_samples(self, *, num_tokens: int, num_samples: int) -> Iterator[Sample]:
        for index in range(num_samples):
            problem = recall_problem(Random(f"kv:{num_tokens}:{index}"), num_tokens=num_tokens)
            tokens, weights = self.encoder.conversation(problem)
            scored = [place for place, weight in enumerate(weights) if weight > 0]
            num_context = (scored[0] - 1) // self._block * self._block
            yield self._sample(tokens, num_context=num_context, scored=scored)

    def text_loss(self, samples: Sequence[Sample], distort: Distort) -> float:
        """Nats per token of what follows."""
        nats = [
            F.cross_entropy(self._logits(sample, distort), self._wanted(sample), reduction="mean").item()
            for sample in samples
        ]
        return math.fsum(nats) / len(nats)

    def recall(self, samples: Sequence[Sample], distort: Distort) -> float:
        """The share of answers that are right."""
        right = [
            bool((self._logits(sample, distort).argmax(-1) == self._wanted(sample)).all())
            for sample in samples
        ]
        return sum(right) / len(right)

    def _wanted(self, sample: Sample) -> torch.Tensor:
        return torch.tensor([sample.tokens[place] for place in sample.scored])

    def _sample(self, tokens: list[int], *, num_context: int, scored: list[int]) -> Sample:
        self._forward(tokens, 0, num_context, wanted=[num_context - 1])
        blocks = range(num_context // self._block)
        arena_SX = np.empty((len(blocks), self.info.layout.block_bytes), np.uint8)
        self._pool.save(blocks, arena_SX, blocks)
        return Sample(tokens=tokens, num_context=num_context, scored=scored, blocks=arena_SX)

    def _logits(self, sample: Sample, distort: Distort) -> torch.Tensor:
        arena_SX, blocks = sample.blocks.copy(), range(len(sample.blocks))
        distort(arena_SX, blocks)
        self._pool.load(blocks, arena_SX, blocks)
        before = [place - 1 for place in sample.scored]
        return self._forward(sample.tokens, sample.num_context, len(sample.tokens) - 1, wanted=before)

    def _forward(self, tokens: list[int], first: int, stop: int, *, wanted: Sequence[int]) -> torch.Tensor:
        """Logits of the tokens at `wanted`, from computing first..stop-1 on top of what the pages hold."""
        positions_T = torch.arange(first, stop)
        table_RL = torch.arange(MAX_TOKENS // self._block, dtype=torch.int32)[None]
        return self._transformer.forward(
            TokenBatch(
                token_ids_T=torch.tensor(tokens[first:stop]),
                positions_T=positions_T,
                slots_T=positions_T,
                rows_T=torch.zeros_like(positions_T),
                table_RL=table_RL,
                num_singles=0,
                chunks=(Chunk(start=0, stop=stop - first, num_prefix=first, pages=table_RL[0]),),
                sampled_S=torch.tensor(wanted) - first,
                chunk_bounds=ChunkBounds(
                    starts=torch.tensor([0, stop - first]), lengths_N=torch.tensor([stop])
                ),
            )
        )
