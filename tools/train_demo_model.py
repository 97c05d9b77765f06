"""Trains the demo model that ships with Penstock and writes it in the Hugging Face format.

    python tools/train_demo_model.py --run build/demo --steps 6000      # train; checkpoints and a log under build/demo
    python tools/train_demo_model.py --run build/demo --steps 9000 --resume
    python tools/train_demo_model.py --run build/demo --export          # write models/demo from the newest checkpoint
    make bench BENCH=demo_model                                         # measure what was written
    python tools/train_demo_model.py --run build/demo --card            # write its card from what was measured

Every step draws its rows from a generator seeded by the step, so a resumed run continues as if it had never
stopped.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks for modules beside the script only

from tools.demo_card import training_sentence, write_card  # noqa: E402
from tools.demo_corpus import load_documents  # noqa: E402
from tools.demo_export import write_model  # noqa: E402
from tools.demo_network import Network, Shape  # noqa: E402
from tools.demo_optimizer import Muon  # noqa: E402
from tools.demo_rows import COUNTED_WEIGHT, Batch, Encoder, make_batch  # noqa: E402
from tools.demo_tokenizer import train_tokenizer  # noqa: E402

MODEL_DIRECTORY = ROOT / "models" / "demo"
REPORT = ROOT / "bench" / "results" / "demo_model.json"
BALANCE_WEIGHT = 0.01
WARM_UP_STEPS = 50
DECAY_SHARE = 0.3  # the learning rate falls to zero over the last part of the steps
LOG_STEPS = 25
LONG_TOKENS = 1024
LONG_SHARES = {"recall": 0.6, "text": 0.4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A stage of the curriculum: how long rows are, what they hold, and how many tokens a step takes."""

    lengths: tuple[int, ...]
    shares: dict[str, float]
    step_tokens: int = 4096

    def shares_of(self, length: int) -> dict[str, float]:
        """What rows of `length` tokens hold: the short tasks would only repeat themselves in long ones."""
        return self.shares if length < LONG_TOKENS else LONG_SHARES


# Lists grow when the values in them are found: a model that cannot copy yet learns nothing from long rows,
# and it starts to copy after a number of steps rather than of tokens, so the first steps are small.
LEVELS = (
    Level(
        lengths=(64,),
        shares={"recall": 0.2, "shuffled": 0.25, "echo": 0.4, "copy": 0.1, "text": 0.05},
        step_tokens=2048,
    ),
    Level(
        lengths=(64, 128),
        shares={
            "recall": 0.5,
            "shuffled": 0.15,
            "echo": 0.1,
            "copy": 0.05,
            "arithmetic": 0.05,
            "json": 0.05,
            "text": 0.1,
        },
        step_tokens=2048,
    ),
    Level(
        lengths=(128, 256),
        shares={"recall": 0.45, "shuffled": 0.1, "copy": 0.1, "arithmetic": 0.1, "json": 0.1, "text": 0.15},
    ),
    Level(
        lengths=(128, 256, 512),
        shares={"recall": 0.35, "shuffled": 0.05, "copy": 0.1, "arithmetic": 0.1, "json": 0.1, "text": 0.3},
    ),
    Level(
        lengths=(128, 128, 256, 256, 512, 1024),
        shares={"recall": 0.25, "copy": 0.1, "arithmetic": 0.15, "json": 0.1, "text": 0.4},
    ),
    Level(
        lengths=(128, 128, 256, 256, 512, 512, 1024, 2048),
        shares={"recall": 0.16, "copy": 0.1, "arithmetic": 0.18, "json": 0.1, "text": 0.46},
    ),
)
LEVEL_UP_ACCURACY = 0.85


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a run must remember besides weights."""

    step: int = 0
    level: int = 0
    num_tokens: int = 0
    recall: float = 0.0  # share of the value tokens that were right, smoothed over about 30 steps

    def observe(self, recall: float | None) -> None:
        """Takes the step's accuracy and moves to longer lists when it is high."""
        if recall is not None:
            self.recall += (recall - self.recall) / 30
        if self.recall > LEVEL_UP_ACCURACY and self.level + 1 < len(LEVELS):
            self.level += 1
            self.recall = min(self.recall, 0.6)


@dataclass(kw_only=True, slots=True)
class Tally:
    """Right and all counted tokens per kind of task, and the text's loss, since the last line of the log."""

    right: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    text_loss: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def line(self) -> dict[str, float]:
        found = {kind: round(self.right[kind] / self.total[kind], 3) for kind in sorted(self.total)}
        for name, values in (("text_loss", self.text_loss), ("loss", self.loss)):
            if values:
                found[name] = round(sum(values) / len(values), 3)
        return found


class Trainer:
    """One run: the network, its optimizers and its progress, all of it in one checkpoint file."""

    def __init__(self, options: argparse.Namespace, *, documents: Sequence[str]) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.directory = Path(options.run)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device)
        self.network = Network(Shape()).to(self.device)
        matrices = [
            p
            for name, p in self.network.named_parameters()
            if p.ndim >= 2 and "layers" in name and "router" not in name
        ]
        known = {id(p) for p in matrices}
        others = [p for p in self.network.parameters() if id(p) not in known]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=options.muon_lr),
            torch.optim.AdamW(others, lr=options.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.base_rates = (options.muon_lr, options.adam_lr)
        self.progress = Progress()
        tokenizer = load_tokenizer(self.directory)
        self.encoder = Encoder(tokenizer)
        self.text = self.encoder.documents(documents)

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def resume(self) -> None:
        saved: dict[str, Any] = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.network.load_state_dict(saved["network"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress = Progress(**saved["progress"])

    def save(self) -> None:
        progress = self.progress
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {name: getattr(progress, name) for name in ("step", "level", "num_tokens", "recall")},
        }
        torch.save(state, self.checkpoint.with_suffix(".new"))
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)

    def train(self) -> None:
        tally, since = Tally(), time.monotonic()
        while self.progress.step < self.options.steps:
            self.advance(tally)
            step = self.progress.step
            if step % LOG_STEPS == 0:
                line = {"step": step, "level": self.progress.level, "tokens": self.progress.num_tokens}
                seconds = time.monotonic() - since
                print(json.dumps(line | {"s": round(seconds, 1)} | tally.line()), flush=True)
                tally, since = Tally(), time.monotonic()
            if step % self.options.save_steps == 0:
                self.save()
        self.save()

    def advance(self, tally: Tally) -> None:
        """One step: a batch, its gradients, the optimizers, the level."""
        progress = self.progress
        rng = Random(f"{self.options.seed}:{progress.step}")
        level = LEVELS[progress.level]
        length = rng.choice(level.lengths)
        shape = (level.step_tokens // length, length)
        batch = make_batch(rng, self.encoder, self.text, shares=level.shares_of(length), shape=shape)
        rate = learning_rate(progress.step, num_steps=self.options.steps)
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.zero_grad(set_to_none=True)
        recall = self._learn(batch, tally)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        progress.step += 1
        progress.num_tokens += shape[0] * shape[1]
        progress.observe(recall)

    def _learn(self, batch: Batch, tally: Tally) -> float | None:
        """Gradients of one batch. Returns the share of recall's value tokens that were right."""
        tokens_NT, weights_NT = batch.tokens_NT.to(self.device), batch.weights_NT.to(self.device)
        hidden_NTD, balance = self.network.hidden(tokens_NT[:, :-1])
        learnt_NT = weights_NT > 0
        logits_SV = self.network.logits(hidden_NTD[learnt_NT])
        targets_S, weights_S = tokens_NT[:, 1:][learnt_NT], weights_NT[learnt_NT]
        losses_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        loss = (losses_S * weights_S).sum() / weights_S.sum()
        (loss + BALANCE_WEIGHT * balance).backward()  # type: ignore[no-untyped-call]
        tally.loss.append(loss.item())
        rows_S = torch.nonzero(learnt_NT)[:, 0]
        return _account(
            tally, batch, rows_S.cpu(), (logits_SV.argmax(-1) == targets_S).cpu(), losses_S.detach().cpu()
        )


def _account(
    tally: Tally, batch: Batch, rows_S: torch.Tensor, right_S: torch.Tensor, losses_S: torch.Tensor
) -> float | None:
    weights_S = batch.weights_NT[batch.weights_NT > 0]
    found = [0, 0]
    for row, kind in enumerate(batch.kinds):
        mine_S = rows_S == row
        if kind == "text":
            tally.text_loss.append(losses_S[mine_S].mean().item())
            continue
        mine_S &= weights_S == COUNTED_WEIGHT
        right, total = int(right_S[mine_S].sum()), int(mine_S.sum())
        tally.right[kind] += right
        tally.total[kind] += total
        if kind == "recall":
            found[0] += right
            found[1] += total
    return found[0] / found[1] if found[1] else None


def learning_rate(step: int, *, num_steps: int) -> float:
    """The share of the full rate: a short rise, a plateau, a straight fall to zero."""
    rise = min(1.0, (step + 1) / WARM_UP_STEPS)
    fall = min(1.0, (num_steps - step) / (num_steps * DECAY_SHARE))
    return rise * fall


def load_tokenizer(directory: Path) -> Tokenizer:
    """The run's tokenizer; trained when the run is new."""
    path = directory / "tokenizer.json"
    if not path.exists():
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default=str(ROOT / "build" / "demo"), help="directory of checkpoints")
    parser.add_argument(
        "--steps", type=int, default=6000, help="the step at which the learning rate reaches zero"
    )
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    what.add_argument("--export", action="store_true", help="write the checkpoint's model into models/demo")
    what.add_argument("--card", action="store_true", help="write the model's card from the bench's figures")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    trainer = Trainer(options, documents=load_documents(held_out=False))
    if options.resume or options.export or options.card:
        trainer.resume()
    if options.export:
        write_model(trainer.network, load_tokenizer(trainer.directory), MODEL_DIRECTORY)
    elif options.card:
        progress = trainer.progress
        training = training_sentence(trainer.network, num_steps=progress.step, num_tokens=progress.num_tokens)
        write_card(MODEL_DIRECTORY, report=REPORT, training=training)
    else:
        trainer.train()


if __name__ == "__main__":
    main()
