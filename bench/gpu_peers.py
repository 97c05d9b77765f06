"""What a user of `transformers` has on the same device: the same shape, noise for weights, its own attention (SDPA).

Without that package, which a bare machine with torch and triton has not, nothing is measured.
"""

import importlib.util
import statistics
from typing import Any

import torch

from bench import gpu_engine
from bench.gpu_engine import timed


def print_transformers(*, device: str = "cuda") -> None:
    if importlib.util.find_spec("transformers") is None:
        print("transformers: not installed here")
        return
    model = _model(device)
    _print_prefill(model)
    for batch in gpu_engine.AIMS:
        _print_decode(model, batch=batch)


def _model(device: str) -> Any:
    import transformers

    shape: dict[str, Any] = gpu_engine.LLAMA_3_8B
    make: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device(device):
        return make(
            transformers.LlamaConfig(**shape),
            dtype=gpu_engine.SETTINGS.weight_dtype,
            attn_implementation="sdpa",
        ).eval()


@torch.inference_mode()
def _print_prefill(model: Any) -> None:
    prompt_1T = torch.randint(0, model.config.vocab_size, (1, gpu_engine.PROMPT), device=model.device)

    def prefill() -> None:
        model(prompt_1T, logits_to_keep=1, use_cache=True)

    prefill()
    seconds = statistics.median(timed(prefill) for _ in range(gpu_engine.NUM_PROMPTS))
    print(f"transformers: prefill of {gpu_engine.PROMPT}: {seconds * 1e3:.0f} ms")


@torch.inference_mode()
def _print_decode(model: Any, *, batch: int) -> None:
    """Steps after contexts as long as those of the engine's steps."""
    context_RT = torch.randint(0, model.config.vocab_size, (batch, gpu_engine.CONTEXT), device=model.device)
    out = model(context_RT, logits_to_keep=1, use_cache=True)
    cache, token_R1 = out.past_key_values, out.logits.argmax(-1)

    def steps(count: int) -> None:
        nonlocal token_R1
        for _ in range(count):
            out = model(token_R1, past_key_values=cache, use_cache=True)
            token_R1 = out.logits.argmax(-1)

    steps(gpu_engine.NUM_WARMUP)
    seconds = timed(lambda: steps(gpu_engine.NUM_STEPS)) / gpu_engine.NUM_STEPS
    print(f"transformers: decode step at batch {batch}: {seconds * 1e3:.2f} ms")
