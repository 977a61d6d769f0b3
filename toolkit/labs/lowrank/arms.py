"""The arms that every chapter of this part is compared with, on the shared test beds.

Each function returns two dicts by arm: the arguments for the bed's ``..._run``, and the middle of
the first learning rates to try (see :func:`toolkit.labs.trials.tune_all`).
"""

from __future__ import annotations

from typing import Any

from toolkit.lowrank.adalora import AdaLoRA
from toolkit.lowrank.lora import LoRA

Arms = tuple[dict[str, dict[str, Any]], dict[str, float]]


def planted(steps: int = 1500, total: int = 10, start: int = 6) -> Arms:
    """LoRA of the same rank everywhere, AdaLoRA from rank ``start``, and full fine-tuning.

    Args:
        steps: of a run; AdaLoRA keeps its full budget for a fifteenth of them and its final
            ranks for the last third.
        total: final ranks in all, a multiple of the five layers.
        start: AdaLoRA's rank at the start.

    Raises:
        ValueError: ``total`` is no multiple of five.
    """
    if total % 5:
        raise ValueError(f"total: must be a multiple of the five layers, got {total}")
    adalora = AdaLoRA(
        rank=start, total_rank=total, warmup=steps // 15, final=steps // 3,
        interval=max(1, steps // 150),
    )  # fmt: skip
    arms = {"lora": LoRA(rank=total // 5), "adalora": adalora, "full": None}
    return (
        {arm: {"method": method, "steps": steps} for arm, method in arms.items()},
        {"lora": 1e-2, "adalora": 1e-2, "full": 1e-3},
    )


def texts(name: str, steps: int, data_seed: int, rank: int = 2, tiny: bool = False) -> Arms:
    """LoRA, AdaLoRA with the same final ranks from twice as many, and full fine-tuning.

    Args:
        name: "sst2" or "cola".
        steps: of 16 sentences each; the training part holds as many as they see.
        data_seed: of the choice of sentences.
        rank: average final rank of the twelve layers.
        tiny: see :func:`text_job`.
    """
    adalora = AdaLoRA(rank=2 * rank, target_rank=rank, warmup=steps // 10, final=steps // 3)
    arms = {"lora": LoRA(rank=rank), "adalora": adalora, "full": None}
    return (
        {arm: text_job(name, method, steps, data_seed, tiny) for arm, method in arms.items()},
        {"lora": 3e-3, "adalora": 3e-3, "full": 3e-4},
    )


def text_job(
    name: str, method: Any, steps: int, data_seed: int, tiny: bool = False, **more: Any
) -> dict[str, Any]:
    """Arguments of :func:`toolkit.labs.beds.sentences.text_run` for one method.

    With ``tiny``, for scale ``ci``: generated sentences and a random encoder.
    """
    sizes: dict[str, Any] = {"train": 16 * steps, "validation": 200, "test": 500}
    if tiny:
        sizes = {"train": 20, "validation": 8, "test": 12, "tiny": True}
    job = {"name": name, "sizes": sizes, "data_seed": data_seed, "method": method, "steps": steps}
    return job | more


def digits(steps: int = 400, rank: int = 2, **task: Any) -> Arms:
    """LoRA and full fine-tuning on the digits.

    Args:
        steps: of 64 images each.
        rank: of the difference; the scale is 2, that is alpha = 2 * rank.
        **task: ``examples``, ``noise``, ``targets``: see
            :func:`toolkit.labs.beds.tasks.digits_train`.
    """
    lora = LoRA(rank=rank, alpha=2.0 * rank)
    full = {key: value for key, value in task.items() if key != "targets"}
    return (
        {"lora": {"method": lora, "steps": steps} | task,
         "full": {"method": None, "steps": steps} | full},
        {"lora": 1e-2, "full": 3e-3},
    )  # fmt: skip
