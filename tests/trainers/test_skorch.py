"""Training under skorch, which steps with a closure, gives the plain loop's tensors."""

from __future__ import annotations

import pytest
from torch import nn

from tests.trainers.tasks import BATCH, EPOCHS, METHODS, X, Y, assert_equals, driven, network, plain

skorch = pytest.importorskip("skorch", reason="skorch is not installed")


def classifier(name: str, adapted, epochs: int = EPOCHS):
    def optimizer(parameters, lr):
        return driven(name, adapted)  # skorch gives names as well, and its own rate

    return skorch.NeuralNetClassifier(
        adapted.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=optimizer,
        max_epochs=epochs,
        batch_size=BATCH,
        train_split=None,
        iterator_train__shuffle=False,
        verbose=0,
    )


@pytest.mark.parametrize("name", METHODS)
def test_skorch_gives_the_same_tensors(name):
    adapted = network(name)
    classifier(name, adapted).fit(X, Y)
    assert_equals(adapted, plain(name))


@pytest.mark.parametrize("name", METHODS)
def test_skorch_resumes_from_its_files_alone(name, tmp_path):
    files = {
        "f_params": str(tmp_path / "model.pt"),
        "f_optimizer": str(tmp_path / "optimizer.pt"),
        "f_history": str(tmp_path / "history.json"),
    }
    first = network(name)
    net = classifier(name, first, 1).fit(X, Y)
    net.save_params(**files)
    adapted = network(name)
    net = classifier(name, adapted, EPOCHS - 1).initialize()
    net.load_params(**files)
    net.partial_fit(X, Y)
    assert_equals(adapted, plain(name))
