"""Training under Composer, with and without a closure, gives the plain loop's tensors."""

from __future__ import annotations

import pytest
from torch import nn

from tests.trainers.tasks import EPOCHS, METHODS, assert_equals, driven, loader, network, plain

composer = pytest.importorskip("composer", reason="composer (mosaicml) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Task(composer.ComposerModel):
    """The adapted model as Composer trains it."""

    def __init__(self, adapted):
        super().__init__()
        self.net = adapted.model

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])


def fit(name: str, adapted, closure: bool, **options) -> composer.Trainer:
    optimizer = driven(name, adapted)
    optimizer._step_supports_amp_closure = closure  # by which Composer decides how to step
    trainer = composer.Trainer(
        model=Task(adapted),
        train_dataloader=loader(),
        optimizers=optimizer,
        device="cpu",
        precision="fp32",
        progress_bar=False,
        seed=0,
        **{"max_duration": f"{EPOCHS}ep", **options},
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_composer_gives_the_same_tensors(name, closure):
    adapted = network(name)
    fit(name, adapted, closure).close()
    assert_equals(adapted, plain(name))


@pytest.mark.parametrize("name", METHODS)
def test_composer_resumes_from_its_checkpoint_alone(name, tmp_path):
    # in the midst of an epoch; but not where a tensor has just grown, whose moments, which are not
    # there yet, torch's own checkpoints ask for
    trainer = fit(name, network(name), True, max_duration="5ba")
    saved = trainer.save_checkpoint(str(tmp_path / "one.pt"))
    trainer.close()
    adapted = network(name)
    fit(name, adapted, True, load_path=saved).close()
    assert_equals(adapted, plain(name))
