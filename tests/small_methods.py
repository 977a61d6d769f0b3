"""Every low-rank method with settings for runs of a few steps, in which all of it happens."""

from __future__ import annotations

from toolkit import AdaLoRA, IncreLoRA, LoRA, LoRAGGPO, LoRAPro, TriAdaptLoRA

METHODS = {
    "lora": LoRA(rank=3),
    "adalora": AdaLoRA(rank=3, target_rank=1, warmup=1, final=2, interval=2),
    "increlora": IncreLoRA(target_rank=2, top=2, interval=2, warmup=1, restart_warmup=2),
    "triadaptlora": TriAdaptLoRA(target_rank=2, block=1, warmup=1),
    "lora_pro": LoRAPro(rank=3, mode="efficient"),
    "lora_ggpo": LoRAGGPO(rank=3, sigma=0.1),
}
