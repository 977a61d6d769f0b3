"""Training under transformers.Trainer and under Accelerate gives the plain loop's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.hf.loops import BATCH, CLIP, METHODS, STEPS, linear, plain, prepared, rows, stacked
from tests.hf.models import gpt2, logits, shake, tokens
from tests.pairs import run_pair
from toolkit import LoRA, adapt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture(scope="module")
def expected():
    return {slug: plain(slug) for slug in METHODS}


class InOrder(transformers.Trainer):
    """Trainer that keeps the order of the data."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(adapted, optimizer, folder, resume=None, callbacks=()):
    """Run Trainer over the rows, from a checkpoint if one is given."""
    trainer = InOrder(
        model=adapted.model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
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
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("slug", METHODS)
def test_trainer_gives_the_same_weights(slug, expected, tmp_path):
    adapted, optimizer = prepared(slug)
    trained(adapted, optimizer, tmp_path)
    for name, value in adapted.named_parameters():
        torch.testing.assert_close(value.detach(), expected[slug][name], rtol=1e-6, atol=1e-7)
    if adapted.controller is not None:
        assert adapted.controller.step == STEPS
    if hasattr(adapted.controller, "ranks"):
        assert sum(adapted.controller.ranks().values()) == adapted.controller.target


class StopAt(transformers.TrainerCallback):
    """Saves a checkpoint after some steps and stops."""

    def __init__(self, step: int) -> None:
        self.last = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.last:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("slug", METHODS)
def test_trainer_resumes_from_its_checkpoint_alone(slug, expected, tmp_path):
    adapted, optimizer = prepared(slug)
    trained(adapted, optimizer, tmp_path, callbacks=[StopAt(5)])
    adapted, optimizer = prepared(slug)
    trained(adapted, optimizer, tmp_path, resume=str(tmp_path / "checkpoint-5"))
    assert {n for n, _ in adapted.named_parameters()} == expected[slug].keys()
    for name, value in adapted.named_parameters():
        torch.testing.assert_close(value.detach(), expected[slug][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("slug", METHODS)
def test_accelerate_resumes_from_its_state_alone(slug, expected, tmp_path):
    from accelerate import Accelerator

    def run(first: int, last: int, load: bool) -> dict[str, torch.Tensor]:
        accelerator = Accelerator(cpu=True)
        adapted, optimizer = prepared(slug)
        scheduler = linear(optimizer)
        model, optimizer = accelerator.prepare(adapted.model, optimizer)
        accelerator.register_for_checkpointing(scheduler)
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        model.train()
        for step in range(first, last):
            optimizer.zero_grad()
            batch = stacked(rows()[step * BATCH : (step + 1) * BATCH])
            accelerator.backward(model(**batch).loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
        if not load:
            accelerator.save_state(str(tmp_path / "state"))
        return {n: p.detach() for n, p in adapted.named_parameters()}

    run(0, 5, load=False)
    after = run(5, STEPS, load=True)
    for name, value in expected[slug].items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-7)


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


def test_libraries_save_an_adapted_model_that_its_base_loads(tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    class Net(torch.nn.Module, PyTorchModelHubMixin):
        def __init__(self, width: int = 8):
            super().__init__()
            self.fc = torch.nn.Linear(4, width)

        def forward(self, x):
            return self.fc(x)

    model, x = Net(width=6), torch.randn(3, 4)
    expected = model(x)
    adapt(model, LoRA(rank=2))
    model.save_pretrained(tmp_path)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), expected)


def test_a_tied_and_adapted_head_is_saved_and_loaded_by_its_library(tmp_path):
    model, x = gpt2(), tokens()
    expected = logits(model, x)
    adapted = adapt(model, LoRA(rank=2), ["c_attn", "lm_head"])
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(logits(again, x), expected)
    shake(adapted.parameters())
    other = adapt(gpt2(), LoRA(rank=2), ["c_attn", "lm_head"])
    other.model.load_state_dict(model.state_dict())
    assert torch.equal(logits(other.model, x), logits(model, x))
