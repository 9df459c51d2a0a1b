"""Who is compared with whom, on which rows, and what the comparison has to reach."""

import math
from dataclasses import dataclass
from typing import Any

from benchmarks._train_processes import Contender

MATMUL = Contender(name="matmul", kind="matmul")
OURS_BF16 = Contender(name="ours-bf16", kind="ours", config={"quantization": "none", "compute_dtype": "bf16"})
OURS_FP32 = Contender(name="ours-fp32", kind="ours", config={"quantization": "none", "compute_dtype": "fp32"})
OURS_NF4 = Contender(name="ours-nf4", kind="ours", config={"quantization": "nf4", "compute_dtype": "bf16"})


def _peft(name: str, *, keep_memory: bool = False, **variant: Any) -> Contender:
    return Contender(name=name, kind="peft", config={"variant": variant}, keep_memory=keep_memory)


def _tuned(name: str, **variant: Any) -> tuple[Contender, ...]:
    """The two attentions; which is the faster depends on the lengths and on the processor."""
    return tuple(
        _peft(f"{name}-{attention}", keep_memory=True, attention=attention, mask=False, **variant)
        for attention in ("eager", "sdpa")
    )


_DEFAULT: dict[str, Any] = {"attention": "sdpa", "mask": True}
STOCK = _peft("peft-stock", weights="fp32", autocast=True, **_DEFAULT)
STOCK_FP32 = _peft("peft-fp32", weights="fp32", autocast=False, **_DEFAULT)
STOCK_NF4 = _peft("peft-nf4", weights="nf4", autocast=True, kbit=True, **_DEFAULT)
STOCK_NF4_CHECKPOINTING = _peft(
    "peft-nf4-checkpointing", weights="nf4", autocast=True, kbit=True, checkpointing=True, **_DEFAULT
)
TUNED = (
    *_tuned("peft-tuned-autocast", weights="bf16", autocast=True),
    *_tuned("peft-tuned", weights="bf16", autocast=False),
)
TUNED_FP32 = _tuned("peft-tuned-fp32", weights="fp32", autocast=False)
TUNED_NF4 = (
    *_tuned("peft-tuned-nf4-autocast", weights="nf4", autocast=True),
    *_tuned("peft-tuned-nf4", weights="nf4", autocast=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table.

    Attributes:
        work: which rows they train on.
        peers: candidates, of which the fastest is taken.
        must, aim: the peer's time by ours; `memory`: at most so much of the peer's peak.
        tolerance: of the loss, of any step, relative; infinite where the base weights differ.
        environment: folder below --environments where the peer is installed.
    """

    title: str
    work: str
    ours: Contender
    peers: tuple[Contender, ...]
    must: float | None = None
    aim: float | None = None
    memory: float | None = None
    tolerance: float = 0.02
    environment: str | None = None

    @property
    def group(self) -> str:
        """Rows that are measured together; those of other environments apart, for the sake of memory."""
        return f"{self.work}-others" if self.environment else self.work


def _other(name: str, title: str, *variants: dict[str, Any]) -> Row:
    peers = tuple(
        Contender(name="-".join((name, *map(str, variant.values()))), kind=name, config={"variant": variant})
        for variant in variants or ({},)
    )
    return Row(title=title, work="alpaca", ours=OURS_BF16, peers=peers, must=1.0, environment=name)


FP32_TOLERANCE = 1e-4
ROWS: dict[str, Row] = {
    "stock": Row(title="LoRA bf16, *stock* PEFT", work="alpaca", ours=OURS_BF16, peers=(STOCK,),
                 must=3.0, aim=3.8, memory=0.5),
    "tuned": Row(title="LoRA bf16, *tuned* PEFT", work="sorted", ours=OURS_BF16, peers=TUNED,
                 must=2.0, aim=2.5, memory=0.45),
    "flat256": Row(title="the same, 8×256, favours the peer", work="flat256", ours=OURS_BF16, peers=TUNED,
                   must=1.1, aim=1.4, memory=0.5),
    "flat1024": Row(title="the same, 4×1024, favours the peer", work="flat1024", ours=OURS_BF16, peers=TUNED,
                    must=1.1, aim=1.4, memory=0.2),
    "fp32": Row(title="LoRA fp32, PEFT fp32", work="alpaca", ours=OURS_FP32, peers=(STOCK_FP32,),
                must=1.9, aim=2.2, memory=0.5, tolerance=FP32_TOLERANCE),
    "fp32-tuned": Row(title="LoRA fp32, *tuned* PEFT fp32", work="sorted", ours=OURS_FP32, peers=TUNED_FP32,
                      tolerance=FP32_TOLERANCE),
    "qlora": Row(title="QLoRA NF4, PEFT + bitsandbytes", work="alpaca", ours=OURS_NF4, peers=(STOCK_NF4,),
                 must=3.0, memory=0.4),
    "qlora-checkpointing": Row(title="the same, the peer with gradient checkpointing", work="alpaca", ours=OURS_NF4,
                               peers=(STOCK_NF4_CHECKPOINTING,), must=3.7, memory=0.7),
    "qlora-tuned": Row(title="QLoRA NF4, *tuned* PEFT + bitsandbytes", work="sorted", ours=OURS_NF4, peers=TUNED_NF4),
    "price": Row(title="our QLoRA, our LoRA bf16", work="alpaca", ours=OURS_NF4, peers=(OURS_BF16,),
                 must=1 / 1.03, memory=1.0, tolerance=math.inf),
    "trl": _other("trl", "LoRA bf16, TRL `SFTTrainer`",
                  {"weights": "fp32", "attention": "sdpa", "checkpointing": False},
                  {"weights": "bf16", "attention": "sdpa", "checkpointing": False}),
    "unsloth": _other("unsloth", "LoRA bf16, Unsloth, CPU mode", {"checkpointing": False}),
    "torchtune": _other("torchtune", "LoRA bf16, torchtune"),
    "litgpt": _other("litgpt", "LoRA bf16, LitGPT"),
}  # fmt: skip
# Lines of tables of their own.
LIMIT, COLD = "limit", "cold"
QUICK = ("stock", "qlora", LIMIT)
EVERY = (*ROWS, LIMIT, COLD)
