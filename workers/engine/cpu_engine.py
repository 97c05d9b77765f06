"""The parts of an engine on this machine's CPU, with the kernels in numba: importing this compiles them."""

from workers.engine.batch import BatchBuilder
from workers.engine.engine_parts import AtOnce, EngineParts, OpenedModel
from workers.engine.kv_pool import KvPool
from workers.model.cpu_operations import cpu_transformer
from workers.model.weights import ModelWeights


def cpu_parts(opened: OpenedModel, weights: ModelWeights, *, num_pages: int) -> EngineParts:
    """Raises `ValueError` for less than a page."""
    model = opened.info
    kv_pool = KvPool(model.layout, num_pages=num_pages)
    transformer = cpu_transformer(
        opened.config, weights, pages_LP2GBC=kv_pool.pages_LP2GBC, max_model_len=model.max_model_len
    )
    return EngineParts(
        forward=transformer.forward,
        kv_pool=kv_pool,
        batches=BatchBuilder(
            block_size_tokens=model.layout.block_size_tokens,
            max_pages_per_request=opened.max_pages_per_request,
        ),
        sampler=AtOnce(opened.sampler),
    )
