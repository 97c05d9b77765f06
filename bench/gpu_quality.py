"""What a GPU's weights of 8 and 4 bits cost the shipped model, on a CPU: the formulas of its kernels, in float32.

    make bench BENCH=gpu_quality [ARGS=--quick]

The problems and texts are held out from training, as in `bench.engine`.
"""

import argparse

from bench.quantized_quality import qualities
from bench.report import Claim, write_report
from workers.quantization import GPU_QUANTIZATIONS

# Of perplexity. 4 bits without calibration are for models that are larger than this one.
AIMS = {"w8a16": 0.01, "w4a16": 0.1, "fp8": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few problems; keep no result")
    quick = parser.parse_args().quick
    whole, *found = qualities(("none", *GPU_QUANTIZATIONS), num_samples=2 if quick else 16)
    print(f"float32: perplexity {whole.figures.perplexity:.3f}, {_answers(whole.figures.accuracy)}")
    claims = []
    for kind, quality in zip(GPU_QUANTIZATIONS, found, strict=True):
        rise = quality.figures.perplexity / whole.figures.perplexity - 1
        print(
            f"{kind}: perplexity {quality.figures.perplexity:.3f}, error of the logits {quality.logits_error:.4f}"
            f" of their size, same best token {quality.same_best:.4f}, {_answers(quality.figures.accuracy)}"
        )
        name = f"{kind}_perplexity_rise"
        claims.append(Claim(name=name, value=rise, unit="fraction", aim=AIMS[kind], better="lower"))
    write_report("gpu_quality", claims, keep=not quick)


def _answers(accuracy: dict[str, float]) -> str:
    return "right: " + ", ".join(f"{task} {share:.2f}" for task, share in accuracy.items())


if __name__ == "__main__":
    main()
