"""Training under Lightning, which always steps with a closure, gives the plain loop's tensors."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from tests.trainers.tasks import (
    EPOCHS,
    METHODS,
    PENALISED,
    assert_equals,
    driven,
    loader,
    network,
    plain,
)

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
for logger in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(logger).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Task(lightning.LightningModule):
    """Attaches where Lightning asks for the optimizer."""

    def __init__(self, name: str, manual: bool = False, **options):
        super().__init__()
        self.name, self.options, self.skip = name, options, ()
        self.held = [network(name)]  # in a list, as the model below it is the module to save
        self.model = self.held[0].model
        self.automatic_optimization = not manual

    def training_step(self, batch, number):
        if number in self.skip:
            return None
        x, y = batch
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.options.get("penalty") == "loss":
            adapted = self.held[0]
            loss = loss + adapted.method.orthogonality * adapted.controller.penalty()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return driven(self.name, self.held[0], **self.options)


def fit(task: Task, resume=None, **options) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": EPOCHS, **options},
    )
    trainer.fit(task, loader(), ckpt_path=resume)
    task.last = trainer


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_lightning_gives_the_same_tensors(name, manual):
    task = Task(name, manual)
    fit(task)
    assert_equals(task.held[0], plain(name))


@pytest.mark.parametrize("name", METHODS)
def test_lightning_clips_and_resumes_from_its_checkpoint_alone(name, tmp_path):
    task = Task(name)
    fit(task, max_epochs=1, gradient_clip_val=0.1)
    task.last.save_checkpoint(tmp_path / "one.ckpt")
    task = Task(name)
    fit(task, resume=tmp_path / "one.ckpt", gradient_clip_val=0.1)
    assert_equals(task.held[0], plain(name, clip=0.1))


@pytest.mark.parametrize("name", PENALISED)
def test_a_penalty_in_the_loss_is_clipped_by_lightning(name):
    task = Task(name, penalty="loss")
    fit(task, gradient_clip_val=0.01)
    assert_equals(task.held[0], plain(name, clip=0.01, penalty="loss"))


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_that_training_step_leaves_out_is_no_step(name):
    task = Task(name)
    task.skip = (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(task)
    controller = task.held[0].controller
    if controller is not None:
        assert controller.step == 3 * EPOCHS


@pytest.mark.parametrize("name", ["adalora", "increlora", "lora_pro"])
def test_fabrics_optimizer_is_followed(name):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    adapted = network(name)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02)
    model, optimizer = fabric.setup(adapted.model, optimizer)
    adapted.attach(optimizer, total_steps=4 * EPOCHS)
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
    assert_equals(adapted, plain(name))
