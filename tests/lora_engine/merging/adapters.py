"""Adapters of any rank, alpha, scaling and pattern on a few small modules, and their deltas in dense float64."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lora_engine import safetensors_file
from lora_engine.adapter_header import CONFIG, FACTORS, LINEAGE, PREFIX, WEIGHTS
from lora_engine.merging.arrays import Wide
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge

# Name → out × in.
SHAPES = {
    "model.layers.0.self_attn.q_proj": (12, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
    "model.layers.1.self_attn.q_proj": (12, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
}
Q0, DOWN0, Q1, DOWN1 = SHAPES


@dataclass(frozen=True)
class Drawn:
    """What a test adapter is like; `ranks` and `alphas` by last name override rank and alpha."""

    seed: int = 0
    rank: int = 4
    alpha: float = 8.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "down_proj")
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        return [name for name in SHAPES if name.rpartition(".")[2] in self.targets]

    def rank_of(self, module: str) -> int:
        return self.ranks.get(module.rpartition(".")[2], self.rank)

    def scaling_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), self.alphas.get(module.rpartition(".")[2], self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    def factors(self) -> dict[str, tuple[Any, Any]]:
        found = {}
        for module in self.modules:
            random = np.random.default_rng([self.seed, list(SHAPES).index(module)])
            out, width = SHAPES[module]
            A = random.standard_normal((self.rank_of(module), width)).astype(np.float32)
            found[module] = A, random.standard_normal((out, self.rank_of(module))).astype(np.float32)
        return found

    def deltas(self) -> dict[str, Wide]:
        return {
            module: self.scaling_of(module) * (B.astype(np.float64) @ A.astype(np.float64))
            for module, (A, B) in self.factors().items()
        }

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        config = {
            "peft_type": "LORA", "r": self.rank, "lora_alpha": self.alpha, "use_rslora": self.rslora,
            "target_modules": list(self.targets), "base_model_name_or_path": "tests/base",
            "rank_pattern": dict(self.ranks), "alpha_pattern": dict(self.alphas),
        }  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / LINEAGE).write_text(json.dumps({"base_digest": "b" * 64}))
        arrays = {
            f"{PREFIX}{module}{factor}": array
            for module, pair in self.factors().items()
            for factor, array in zip(FACTORS, pair, strict=True)
        }
        safetensors_file.write(folder / WEIGHTS, arrays, {"format": "pt"})
        return folder


def weights() -> st.SearchStrategy[float]:
    sizes = st.floats(0.01, 3)
    return st.one_of(sizes, sizes.map(lambda size: -size))


def drawn() -> st.SearchStrategy[Drawn]:
    names = ("q_proj", "down_proj")
    some = st.sampled_from([names, names[:1], names[1:]])
    return st.builds(
        Drawn,
        seed=st.integers(0, 10_000),
        rank=st.integers(1, 6),
        alpha=st.sampled_from([1.0, 4.0, 7.5, 16.0]),
        rslora=st.booleans(),
        targets=some,
        ranks=st.dictionaries(st.sampled_from(names), st.integers(1, 6), max_size=1),
        alphas=st.dictionaries(st.sampled_from(names), st.sampled_from([2.0, 3.0]), max_size=2),
    )


def weighted_sum(pairs: Sequence[tuple[Drawn, float]]) -> dict[str, Wide]:
    """Σ weight · delta, by module."""
    total: dict[str, Wide] = {}
    for adapter, weight in pairs:
        for module, delta in adapter.deltas().items():
            total[module] = total.get(module, np.zeros(SHAPES[module])) + weight * delta
    return total


def merge_of(folder: Path, pairs: Sequence[tuple[Drawn, float]], **options: Any) -> dict[str, Any]:
    """Merge adapters written into `folder`; the result lies in folder/out."""
    sources = [
        WeightedAdapter(path=str(adapter.write(folder / str(index))), weight=weight)
        for index, (adapter, weight) in enumerate(pairs)
    ]
    return merge(MergeSpec(adapters=sources, output=str(folder / "out"), **options))


def dense(folder: Path) -> dict[str, Wide]:
    """The deltas of a written adapter, by PEFT's rules of scaling, in float64."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = safetensors_file.read_header(folder / WEIGHTS)
    found = {}
    for module in sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}):
        A, B = (
            safetensors_file.read_array(folder / WEIGHTS, tensors[f"{PREFIX}{module}{factor}"]).astype(np.float64)
            for factor in FACTORS
        )
        rank, alpha = (
            next((value for key, value in config[pattern].items() if re.match(rf"(.*\.)?({key})$", module)), default)
            for pattern, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
        )
        assert A.shape[0] == B.shape[1] == rank
        found[module] = alpha / rank * (B @ A)
    return found


def certificate(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return found


def best(matrix: Wide, rank: int) -> Wide:
    """Eckart and Young's best approximation."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    found: Wide = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return found
