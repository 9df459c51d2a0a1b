"""Small adapters as the files that a training leaves, made without torch."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import peft_config, safetensors_file
from tests.service import rows

NAMES = tuple(module["name"] for module in rows.MODULES)
SIZE = rows.MODULES[0]["inputs"]
BASE_DIGEST = "b" * 64


def make_adapter(
    seed: int = 0,
    *,
    rank: int = 2,
    size: int = SIZE,
    modules: Sequence[str] = NAMES,
    base_digest: str = BASE_DIGEST,
    base_name: str = rows.BASE_MODEL,
    **config: Any,
) -> dict[str, bytes]:
    """Files by name. `config` replaces entries of adapter_config.json."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name in modules:
        for factor, shape in (("A", (rank, size)), ("B", (size, rank))):
            key = f"base_model.model.{name}.lora_{factor}.weight"
            arrays[key] = random.standard_normal(shape).astype(np.float32)
    targets = sorted({name.rpartition(".")[2] for name in modules})
    settings = peft_config.portable(rank, rank, base_name, targets) | config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        safetensors_file.write(path, arrays, {"format": "pt"})
        weights = path.read_bytes()
    return {
        "README.md": b"# adapter\n",
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": weights,
        "lineage.json": json.dumps({"base_model": base_name, "base_digest": base_digest}).encode(),
    }


def deltas(folder: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """alpha/r · B·A of every module of an adapter without patterns, in fp64."""
    config = json.loads((folder / "adapter_config.json").read_bytes())
    path = folder / "adapter_model.safetensors"
    arrays = {
        name: safetensors_file.read_array(path, entry).astype(np.float64)
        for name, entry in safetensors_file.read_header(path).items()
    }
    names = {name.removesuffix(".lora_A.weight") for name in arrays if ".lora_A." in name}
    scale = config["lora_alpha"] / config["r"]
    return {n: scale * arrays[f"{n}.lora_B.weight"] @ arrays[f"{n}.lora_A.weight"] for n in names}
