"""README's recipe for TRL's ``GKDTrainer``: the numbers of TRL's own loss, and the same training.

Of ``make test-full``, which installs TRL: without it these fail."""

import os

import pytest
import torch

from tests.interface.test_pages import blocks
from tests.support import ROOT
from tests.support.recipes import VOCAB_SIZE, batch, causal_model

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's trainer and the recipe's."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    (recipe,) = blocks((ROOT / "README.md").read_text())[1]["needs trl"]
    names = {}
    exec(recipe, names)
    return names["GKDTrainer"], names["FusedGKDTrainer"]


@pytest.mark.parametrize("counted", [None, 7, torch.tensor(7)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_the_numbers_are_those_of_trl(trainers, beta, counted):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 9, VOCAB_SIZE, dtype=torch.float64)
    labels = torch.randint(0, VOCAB_SIZE, (3, 9))
    labels[:, :3] = labels[2] = -100
    results = []
    for trainer in trainers:
        leaf = student.clone().requires_grad_()
        loss = trainer.generalized_jsd_loss(  # as compute_loss calls it
            student_logits=leaf[:, :-1], teacher_logits=teacher[:, :-1], labels=labels[:, 1:],
            beta=beta, num_items_in_batch=counted,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert results[0][1].abs().max() > 1e-3


def test_without_a_counted_token_both_are_zero(trainers):
    logits = torch.randn(2, 5, VOCAB_SIZE, requires_grad=True)
    labels = torch.full((2, 5), -100)
    for trainer in trainers:
        assert (
            trainer.generalized_jsd_loss(
                logits, logits.detach(), labels, beta=0.5, num_items_in_batch=None
            ).item()
            == 0
        )


def rows():
    """Tokens of several lengths, the first four of them the prompt, for TRL's own collator."""
    for seed in range(8):
        ids = batch(seed, (1, 10 + seed % 3))["ids"][0].tolist()
        yield {"input_ids": ids, "completion_mask": [0] * 4 + [1] * (len(ids) - 4), "prompt": "w3"}


def tokenizer():
    """A word for every id; no network."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2"
    )


def trained(trainer, folder, lmbda):
    """The student's weights after two steps, of two accumulated batches each, and the losses."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    config = GKDConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lmbda=lmbda,
        beta=0.3,
        temperature=0.7,
        max_new_tokens=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    student = causal_model(0)
    run = trainer(
        model=student, teacher_model=causal_model(1), args=config, train_dataset=Dataset.from_list(list(rows())), processing_class=tokenizer(),
    )  # fmt: skip
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return torch.nn.utils.parameters_to_vector(student.parameters()).detach(), losses


@pytest.mark.parametrize("lmbda", [0.0, 1.0], ids=["data set", "student's own tokens"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_steps_train_alike(trainers, lmbda, tmp_path, monkeypatch):
    called = []
    ours = trainers[1].generalized_jsd_loss

    def counted(**arguments):
        called.append(arguments)
        return ours(**arguments)

    monkeypatch.setattr(trainers[1], "generalized_jsd_loss", staticmethod(counted))
    start = torch.nn.utils.parameters_to_vector(causal_model(0).parameters()).detach()
    (theirs, their_losses), (weights, losses) = (trained(t, tmp_path, lmbda) for t in trainers)
    assert len(called) == 4
    assert set(called[0]) == {
        "student_logits", "teacher_logits", "labels", "beta", "num_items_in_batch",
    }  # fmt: skip
    if lmbda == 0:  # of the accumulated batches together; TRL counts the data set's tokens always
        counts = [(arguments["labels"] != -100).sum() for arguments in called]
        assert called[0]["num_items_in_batch"] == counts[0] + counts[1]
    assert losses == pytest.approx(their_losses, rel=1e-3)
    assert (theirs - start).norm() > 0.1
    assert (weights - theirs).norm() < 1e-3 * (theirs - start).norm()
