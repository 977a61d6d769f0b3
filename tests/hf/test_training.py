"""Training under transformers.Trainer and under Accelerate gives the plain loop's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.loops import BATCH, CLIP, METHODS, STEPS, linear, plain, prepared, rows
from tests.pairs import run_pair

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(scope="module")
def expected():
    return {slug: plain(slug) for slug in METHODS}


class InOrder(transformers.Trainer):
    """Trainer that keeps the order of the data."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("slug", METHODS)
def test_trainer_gives_the_same_weights(slug, expected, tmp_path):
    adapted, optimizer = prepared(slug)
    trainer = InOrder(
        model=adapted.model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            max_grad_norm=CLIP,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=rows(),
        optimizers=(optimizer, linear(optimizer)),
    )
    trainer.train()
    for name, value in adapted.named_parameters():
        torch.testing.assert_close(value.detach(), expected[slug][name], rtol=1e-6, atol=1e-7)
    if adapted.controller is not None:
        assert adapted.controller.step == STEPS
    if hasattr(adapted.controller, "ranks"):
        assert sum(adapted.controller.ranks().values()) == adapted.controller.target


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate")
    run_pair(Path(__file__).parent / "with_accelerate.py", folder)
    return folder


@pytest.mark.weekly  # every run: tests/contracts/test_two_processes.py
@pytest.mark.parametrize("slug", METHODS)
def test_accelerate_on_two_processes_gives_the_same_weights(slug, expected, two_processes):
    first, second = (load_file(two_processes / f"{slug}.{rank}.safetensors") for rank in range(2))
    assert first.pop("steps") == second.pop("steps") == STEPS
    assert first.keys() == expected[slug].keys()
    for name, value in expected[slug].items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def test_training_moved_the_weights(expected):
    for slug, after in expected.items():
        start, _ = prepared(slug)
        still = [n for n, p in start.named_parameters() if torch.equal(p.detach(), after[n])]
        # lambda may be back at 0 where a layer lost all its triplets
        assert all(n.endswith(".E") for n in still), still
        assert len(still) < len(after) / 4
