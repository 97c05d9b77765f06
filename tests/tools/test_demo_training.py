import argparse
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_eval import RECALL_LENGTHS, held_out_tasks, is_right, recall_problem, text_loss
from tools.demo_network import Network, Shape
from tools.demo_optimizer import Muon, orthogonal
from tools.demo_rows import Encoder, make_batch
from tools.train_demo_model import LEVELS, Progress, Tally, Trainer, learning_rate

TOKENIZER = Tokenizer.from_file(
    str(Path(__file__).resolve().parents[2] / "models" / "demo" / "tokenizer.json")
)
ENCODER = Encoder(TOKENIZER)
DOCUMENTS = ["A document about the standard library. " * 20, "Another document, about values and keys. " * 20]


def _trainer(directory: Path, *, steps: int) -> Trainer:
    TOKENIZER.save(str(directory / "tokenizer.json"))
    options = argparse.Namespace(
        run=directory, steps=steps, save_steps=100, muon_lr=0.02, adam_lr=3e-3, seed=1, device="cpu"
    )
    return Trainer(options, documents=DOCUMENTS)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for directory in (whole, first, second):
        directory.mkdir()
    unbroken = _trainer(whole, steps=2)
    unbroken.train()
    broken = _trainer(first, steps=2)
    broken.advance(Tally())
    broken.save()
    broken.checkpoint.rename(second / "checkpoint.pt")
    resumed = _trainer(second, steps=2)
    resumed.resume()
    resumed.train()
    assert resumed.progress == unbroken.progress
    for one, other in zip(resumed.network.parameters(), unbroken.network.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_only_answers_and_text_are_learnt() -> None:
    text = ENCODER.documents(DOCUMENTS)
    batch = make_batch(Random(0), ENCODER, text, shares={"recall": 1.0, "text": 1.0}, shape=(8, 128))
    assert set(batch.kinds) == {"recall", "text"}
    for row, kind in enumerate(batch.kinds):
        learnt = batch.weights_NT[row] > 0
        assert bool(learnt.all()) is (kind == "text")
        assert learnt.any()


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_level_can_draw_every_kind_at_every_length(level: int) -> None:
    text = torch.zeros(5000, dtype=torch.long)
    for length in LEVELS[level].lengths:
        for kind in LEVELS[level].shares:
            batch = make_batch(Random(1), ENCODER, text, shares={kind: 1.0}, shape=(1, length))
            assert batch.tokens_NT.shape == (1, length + 1)


def test_lists_grow_once_the_values_in_them_are_found() -> None:
    progress = Progress()
    for _ in range(200):
        progress.observe(0.5)
    assert progress.level == 0
    for _ in range(1000):
        progress.observe(1.0)
    assert progress.level == len(LEVELS) - 1


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(step, num_steps=1000) for step in range(1001)]
    assert rates[0] < rates[20] < rates[400] == 1.0 > rates[900] > rates[1000] == 0.0


def test_muon_steps_are_nearly_orthogonal_for_wide_and_tall_matrices() -> None:
    torch.manual_seed(0)
    for size in ((3, 16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(size)).float())
        assert 0.6 < values.min() < values.max() < 1.3


def test_muon_moves_against_the_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    target = torch.randn(8, 8)
    optimizer = Muon([weight], lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_some_heads_of_the_first_layer_start_by_looking_one_and_two_tokens_back() -> None:
    torch.manual_seed(0)
    network = Network(Shape())
    layer = network.blocks()[0]
    x_NTD = layer.input_norm(network.embedding[torch.randint(Shape().vocab_size, (1, 24))])
    queries, keys, _ = layer.attention.heads(x_NTD, *network.rotary(24, torch.device("cpu")))
    scores = (queries @ keys.mT)[0]
    by_distance = torch.stack([scores.diagonal(-distance, -2, -1).mean(-1) for distance in range(12)])
    assert by_distance.argmax(0)[:4].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("num_tokens", RECALL_LENGTHS)
def test_recall_problems_have_about_the_length_they_are_named_for(num_tokens: int) -> None:
    lengths = [
        len(ENCODER.conversation(recall_problem(Random(i), num_tokens=num_tokens))[0]) for i in range(40)
    ]
    assert abs(sum(lengths) / len(lengths) / num_tokens - 1) < 0.06


def test_an_answer_is_right_only_when_every_token_of_it_is() -> None:
    conversation = held_out_tasks(num_samples=1)["json"][0]
    ids = ENCODER.conversation(conversation)[0]

    def oracle(tokens: torch.Tensor, wrong_at: int = -1) -> torch.Tensor:
        following = torch.tensor(ids[1:])
        if wrong_at >= 0:
            following[wrong_at] = (following[wrong_at] + 1) % 100
        return torch.nn.functional.one_hot(following, 2560)[None].float()

    assert is_right(oracle, ENCODER, conversation)
    assert not is_right(lambda tokens: oracle(tokens, len(ids) - 2), ENCODER, conversation)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    perplexity, bits = text_loss(lambda tokens: torch.zeros(*tokens.shape, 2560), ENCODER, DOCUMENTS)
    assert perplexity == pytest.approx(2560, rel=1e-4)
    assert bits > 1
