from pathlib import Path

import pytest

from workers.__main__ import _progress_teller
from workers.engine.engine import load_engine


def test_loading_tells_its_progress_layer_by_layer(checkpoint: Path) -> None:
    shares: list[float] = []
    load_engine(model_path=checkpoint, num_pages=4, on_progress=shares.append)
    assert shares == [number / len(shares) for number in range(1, len(shares) + 1)]


def test_a_worker_logs_every_tenth_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tell = _progress_teller()
    for layer in range(1, 81):
        tell(layer / 80)
    told = [record.fields["progress"] for record in caplog.records]  # type: ignore[attr-defined]
    assert told == [number / 10 for number in range(1, 11)]
