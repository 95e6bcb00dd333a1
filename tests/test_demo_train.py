"""Training: any text round-trips, branches see what a lone question sees, and a run resumes as if never stopped."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from pipeline.demo import train
from pipeline.demo.batches import IGNORED, Packer, SceneBatches, size_bin, size_of
from pipeline.demo.tokenizer import train_tokenizer
from pipeline.moondream.config import MoondreamConfig


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(seed=0, num_scenes=200)


@pytest.fixture(scope="module")
def packer(tokenizer: Tokenizer) -> Packer:
    config = train.demo_config(tokenizer.get_vocab_size())
    return Packer(tokenizer, MoondreamConfig.from_dict(config))


def trainer(packer: Packer) -> train.Trainer:
    return train.Trainer(packer.config, total_steps=10, learning_rate=1e-3, seed=0)


@pytest.mark.parametrize("text", ["A small red star in the center.", "Wie spät ist es? 🎬", " red circle", "x" * 40])
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_place_is_one_token(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode(" at the top left").ids) == 1


def test_the_same_seed_learns_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(seed=0, num_scenes=200).to_str() == tokenizer.to_str()


def test_sizes_keep_their_value_through_the_bins() -> None:
    assert [size_of(size_bin(size)) for size in (0.05, 0.3, 1.0)] == pytest.approx([0.05, 0.3, 1.0], rel=0.01)


def test_a_batch_follows_from_seed_and_step_alone(packer: Packer) -> None:
    first, second = (SceneBatches(packer, (1,), 2, 2, first_step=first_step).batch(7) for first_step in (0, 7))

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_answer_ends_and_no_branch_sees_another(packer: Packer) -> None:
    batch = SceneBatches(packer, (1,), 3, 0).batch(0)
    text = batch["next_token"][batch["next_token"] != IGNORED]
    bias = train._row_bias(batch["branch"], packer.config.prefix_len, n_heads=1)[..., packer.config.prefix_len :]
    is_other = batch["branch"][:, :, None] != batch["branch"][:, None, :]

    assert (text == packer.config.tokenizer.eos_id).sum() == (batch["skills"] != IGNORED).sum()
    assert (bias[is_other] < -1000).all()


def test_packed_branches_are_answered_as_if_asked_alone(packer: Packer) -> None:
    """The loss of a branch does not change with the branches beside it."""
    model = trainer(packer)
    model.model.eval()
    batch = SceneBatches(packer, (1,), 1, 0).batch(0)
    with torch.no_grad():
        _, together = model.forward(batch)
        for row, column in ((0, 0), (len(together) - 1, 0)):
            branch = batch["branch"][row, column]
            of_branch = batch["branch"][row] == branch
            alone = {name: value.clone() for name, value in batch.items()}
            for name in ("inputs", "kinds", "values", "positions", "branch"):
                alone[name] = batch[name][row : row + 1, of_branch]
            alone["image_index"] = batch["image_index"][row : row + 1]
            _, single = model.forward(alone)
            assert torch.allclose(together[row, of_branch].float(), single[0].float(), atol=0.05)


def test_training_lowers_the_loss(packer: Packer) -> None:
    model, batch = trainer(packer), SceneBatches(packer, (1,), 4, 2).batch(0)

    first, *_, last = (sum(model.train_step(batch).values()) for _ in range(8))

    assert last < first


def test_a_resumed_run_goes_on_as_if_never_stopped(packer: Packer, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    batches = SceneBatches(packer, (1,), 2, 2)
    whole = trainer(packer)
    for step in range(2):
        whole.train_step(batches.batch(step))
    whole.save(tmp_path)
    resumed = trainer(packer)
    resumed.resume(tmp_path)

    assert resumed.train_step(batches.batch(2)) == pytest.approx(whole.train_step(batches.batch(2)), rel=1e-4)


def test_the_vision_encoder_learns_alone_at_first(packer: Packer) -> None:
    batch = SceneBatches(packer, (1,), 2, 2, vision_steps=1).batch(0)
    model = trainer(packer)

    assert set(model.train_step(batch)) == {"patch", "box", "background"}


def test_the_program_trains_validates_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "VALIDATION_SCENES", 4)
    sizes = ["--steps", "2", "--vision-steps", "1", "--batch", "2", "--quick", "2", "--save-every", "1"]

    train.main(["--folder", str(tmp_path), *sizes])

    log = [json.loads(row) for row in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in log] == [1, 2]
    assert {p.name for p in (tmp_path / "checkpoint").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
