"""`penstock profile-kv`: learns how a model's KV is distributed, so that chunks of it need no tables of their own.

The model runs in a process of its own: the control plane holds no tensors.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from control_plane.cli.failures import clean_errors
from control_plane.config import PROJECT_ROOT


def profile_kv(
    model_path: Annotated[Path, typer.Argument(metavar="MODEL_PATH", help="Directory of the checkpoint.")],
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="UTF-8 text like what the model will read."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option("--dtype", help="What the workers compute in.")
    ] = "float32",
    quantize: Annotated[
        Literal["none", "int8"], typer.Option("--quantize", help="How the workers keep the weights.")
    ] = "none",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=16, help="How much of the text to read.")
    ] = 32_768,
    key_factors: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Bins of each layer's keys against the usual, as 1,0.25,1,1."),
    ] = None,
) -> None:
    """Write MODEL_PATH/kv_profile.safetensors, with which KV travels in fewer bytes."""
    with clean_errors():
        command = [sys.executable, "-m", "workers.profile_kv", "--model-path", str(model_path.absolute())]
        command += ["--text", str(text.absolute())] if text is not None else []
        command += ["--dtype", dtype, "--quantize", quantize, "--max-tokens", str(max_tokens)]
        command += ["--key-factors", key_factors] if key_factors is not None else []
        done = subprocess.run(command, cwd=PROJECT_ROOT, check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)
