"""Three stacked adapters of rank 16 cut to rank 16, in memory: against PEFT's `svd`, and against the GEMM rate."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _merge_adapters as random_adapters
from benchmarks._merge_report import Section, clock, ratio, take_turns
from lora_engine.merging import sources as merging_sources
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.factors import Factors, load
from lora_engine.merging.low_rank import decompose
from lora_engine.merging.sources import ModulePlan

RANK = 16
ADAPTERS = 3
MODULE = "model.layers.0.self_attn.q_proj"
REPEATS = 10  # of ours in a turn: one takes milliseconds
GEMM = 2048


def compress(folder: Path, options: argparse.Namespace) -> Section:
    """One square module; the same loaded factors, the same result."""
    size = options.module
    section = Section(
        "Compress",
        f"{ADAPTERS} adapters of rank {RANK} on one {size} × {size} module, loaded, summed and cut to rank {RANK}. "
        'PEFT: `add_weighted_adapter(combination_type="svd")`, with its defaults and with `svd_full_matrices=False`. '
        "Error: relative Frobenius distance from the best approximation of that rank, by a dense SVD in float64.",
        ["", "a module", "by Luthier", "error"],
    )
    base = random_adapters.llama(hidden_size=size, intermediate_size=64, num_attention_heads=16, num_hidden_layers=1)
    folders = [
        random_adapters.save_peft(
            folder / f"source-{seed}", seed, base, target_modules=["q_proj"], r=RANK, lora_alpha=32
        )
        for seed in range(ADAPTERS)
    ]
    factors = _loaded(folders)[MODULE]
    model = random_adapters.loaded(base, folders)
    contenders: dict[str, Callable[[], Any]] = {
        "Luthier": partial(_ours, factors),
        "PEFT svd": partial(_peft, model, folders, full=True),
        "PEFT svd, not full": partial(_peft, model, folders, full=False),
    }
    repeated = {**contenders, "Luthier": lambda: [contenders["Luthier"]() for _ in range(REPEATS)]}
    seconds = take_turns(options.rounds, **repeated)
    seconds["Luthier"] = [item / REPEATS for item in seconds["Luthier"]]
    wanted = _best(factors)
    for name, contender in contenders.items():
        B, A = contender()
        off = float((B.double() @ A.double() - wanted).norm() / wanted.norm())
        by = ratio(seconds[name], seconds["Luthier"])
        section.rows.append([name, clock(seconds[name]), f"{by:.0f}", f"{off:.1e}"])
        section.figures[name] = {"seconds": seconds[name], "ratio": by, "error": off}
    model.unload()
    return section


def floor(folder: Path, options: argparse.Namespace) -> Section:
    """The linear layers of a 7B model: 4·(out + in)·R² + 2·(out + in)·R·r operations each."""
    layers = 4 if options.full else 1
    shapes = random_adapters.seven_billion(layers, options.size)
    section = Section(
        "Compress, against the GEMM rate",
        f"The same on all linear layers of a Llama 7B, measured on {layers} of its 32 layers, in memory: orthogonal "
        f"bases of both factors (4·(out + in)·R² operations) and the product with them (2·(out + in)·R·r), R = "
        f"{ADAPTERS * RANK}, r = {RANK}, at the rate of an fp32 product of {GEMM}² matrices.",
        ["32 layers, Luthier", "32 layers at the GEMM rate", "Luthier by that", "GFLOP", "GEMM, GFLOP/s"],
    )
    folders = [random_adapters.save_ours(folder / f"source-{seed}", seed, shapes, RANK) for seed in range(ADAPTERS)]
    factors = _loaded(folders)
    total = sum(outputs + inputs for outputs, inputs in shapes.values())
    stacked = ADAPTERS * RANK
    operations = total * (4 * stacked**2 + 2 * stacked * RANK)
    a, b = (torch.randn(GEMM, GEMM) for _ in range(2))
    seconds = take_turns(
        options.rounds,
        ours=lambda: [decompose(item.B, item.A, item.scale).factors(RANK) for item in factors.values()],
        gemm=lambda: a @ b,
    )
    rates = [2 * GEMM**3 / item for item in seconds["gemm"]]
    by = statistics.median(own / (operations / rate) for own, rate in zip(seconds["ours"], rates, strict=True))
    scale = 32 / layers
    section.rows.append(
        [
            clock([item * scale for item in seconds["ours"]]),
            clock([operations * scale / rate for rate in rates]),
            f"{by:.2f}",
            f"{operations * scale / 1e9:.1f}",
            f"{statistics.median(rates) / 1e9:.0f}",
        ]
    )
    section.figures |= {"seconds": seconds, "operations": operations, "rates": rates, "ratio": by, "layers": layers}
    return section


def _loaded(folders: list[Path]) -> dict[str, Factors]:
    spec = MergeSpec(adapters=[WeightedAdapter(path=str(path)) for path in folders], output="")
    modules: dict[str, ModulePlan] = dict(merging_sources.plan(spec, merging_sources.read(spec)).modules)
    return {name: load(name, plan) for name, plan in modules.items()}


def _ours(factors: Factors) -> tuple[Tensor, Tensor]:
    """B (out × r) and A (r × in), fp32, as PEFT's are."""
    B, A = decompose(factors.B, factors.A, factors.scale).factors(RANK)
    return torch.from_numpy(B.astype(np.float32)), torch.from_numpy(A.astype(np.float32))


def _peft(model: Any, folders: list[Path], *, full: bool) -> tuple[Tensor, Tensor]:
    names = [path.name for path in folders]
    if "merged" in model.peft_config:
        model.delete_adapter("merged")
    model.add_weighted_adapter(
        names, [1.0] * len(names), "merged", combination_type="svd", svd_rank=RANK, svd_full_matrices=full
    )
    layer = model.base_model.model.get_submodule(MODULE)
    return layer.lora_B["merged"].weight.detach() * layer.scaling["merged"], layer.lora_A["merged"].weight.detach()


def _best(factors: Factors) -> Tensor:
    """out × in, by a dense SVD in float64."""
    dense = torch.from_numpy((factors.B * factors.scale) @ factors.A.astype(np.float64))
    U, values, Vt = torch.linalg.svd(dense, full_matrices=False)
    return (U[:, :RANK] * values[:RANK]) @ Vt[:RANK]
