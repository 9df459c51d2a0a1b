"""An adapter from two full checkpoints: the best approximation of W_tuned - W_base, streamed module by module."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lora_engine import adapter, base_files, base_model
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.errors import SpecError
from lora_engine.merging import certificate
from lora_engine.merging.certificate import ModuleCertificate
from lora_engine.merging.config import ExtractSpec
from lora_engine.merging.spectral import norms_of_dense
from lora_engine.safetensors_file import read_array, read_header
from lora_engine.target_modules import Module, last_names
from lora_engine.weights import Weights

_RANK = 16
_WHOLE = 512  # up to so many rows or columns the full decomposition is as quick
_OVERSAMPLED = 16
_SETTLED = 1e-7  # relative change of the energy that is kept
_MOST_ROUNDS = 30


def extract(spec: ExtractSpec, tell: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the adapter to `spec.output` and return its metrics: rank, modules, certificate, and what was left out.

    Memory: three times the largest weight, and the adapter.

    Raises:
        SpecError: a folder that is none; base and tuned model are the same, of unlike architectures, or
            differ in what no adapter can hold.
        BaseModelError: files that are missing or torn.
    """
    base, tuned = (_Checkpoint(name, Path(getattr(spec, name))) for name in ("base_model", "tuned_model"))
    if {item.name: item for item in base.modules} != {item.name: item for item in tuned.modules}:
        raise SpecError(
            "tuned_model: its layers are not those of the base model; give two of one architecture", field="tuned_model"
        )
    others = _other_changes(spec, base, tuned)
    weights, certified, changed = {}, {}, []
    # A head that is tied in both is the embedding, which no adapter on linear layers changes.
    modules = [module for module in base.modules if module.name != base.tied_head or not tuned.tied_head]
    for index, module in enumerate(modules):
        delta = tuned.weight(module) - base.weight(module)
        if delta.any():
            weights[module.name], certified[module.name] = _approximated(delta, spec)
            changed.append(module)
        if tell:
            tell(index + 1, len(modules))
    if not weights:
        raise SpecError("tuned_model: no linear layer differs from the base model's", field="tuned_model")
    return _publish(spec, weights, certified, last_names(base.modules, changed), others)


class _Checkpoint:
    """A model's folder: its linear layers, and its tensors one at a time."""

    def __init__(self, field: str, folder: Path) -> None:
        if not folder.is_dir():
            raise SpecError(f"{field}: {folder} is not a folder", field=field)
        model = base_model.outline(folder, quantization="none", compute_dtype="fp32").model
        self.modules = base_model.linear_modules(model)
        self._field = field
        self._weights = Weights(folder, model)
        self.places = self._weights.places()
        self.tied_head, embedding = _tied(model)
        if self.tied_head:
            self.places[f"{self.tied_head}.weight"] = self.places[f"{embedding}.weight"]
        self._inputs_first = {
            module.name for module in self.modules if isinstance(model.get_submodule(module.name), Conv1D)
        }

    def weight(self, module: Module) -> Tensor:
        """W (out × in), fp32."""
        found = self.read(f"{module.name}.weight")
        return found.T.contiguous() if module.name in self._inputs_first else found

    def read(self, name: str) -> Tensor:
        path, stored = self.places[name]
        array = read_array(path, read_header(path)[stored])
        if not np.isfinite(array).all():
            raise SpecError(f"{self._field}: {stored} has values that are not finite", field=self._field)
        return torch.from_numpy(array)

    def converted(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the files have in another form than the model."""
        return self._weights.tensors(torch.device("cpu"), skip=self.places)


def _tied(model: Any) -> tuple[str, str]:
    """Names of the output head and of the embedding whose weight it shares; empty where they are apart."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return "", ""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(head)], names[id(embedding)]


def _other_changes(spec: ExtractSpec, base: _Checkpoint, tuned: _Checkpoint) -> dict[str, float]:
    """Relative norm of the change of every tensor that is no linear layer's weight."""
    linear = {f"{module.name}.weight" for module in base.modules}
    if missing := (linear | set(base.places)) ^ (linear | set(tuned.places)):
        raise SpecError(f"tuned_model: {min(missing)} is in one of the models alone", field="tuned_model")
    changes = {}
    for name in sorted(set(base.places) - linear):
        changes[name] = _change(name, base.read(name), tuned.read(name))
    for (name, before), (_, after) in zip(base.converted(), tuned.converted(), strict=True):
        changes[name] = _change(name, before, after)
    changes = {name: change for name, change in changes.items() if change}
    if changes and spec.other_changes == "refuse":
        largest = max(changes, key=lambda name: changes[name])
        raise SpecError(
            f"tuned_model: {len(changes)} tensors differ that no adapter on linear layers can hold, most of all "
            f"{largest} (by {changes[largest]:.2g} of its norm); set other_changes to leave_out to do without them",
            field="other_changes",
        )
    return changes


def _change(name: str, before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)} in the base model, {tuple(after.shape)} in the tuned one"
        raise SpecError(f"tuned_model: {name} is {shapes}", field="tuned_model")
    difference = float((after.double() - before.double()).norm())
    return difference / (float(before.double().norm()) or 1.0)


def _approximated(delta: Tensor, spec: ExtractSpec) -> tuple[LoraWeights, ModuleCertificate]:
    B, A = best_factors(delta, spec.rank or _RANK, spec.energy)
    exact, error = norms_of_dense(delta), norms_of_dense(delta - B.float() @ A.float())
    certified = ModuleCertificate(exact, error, exact, error, 0.0, min(delta.shape), A.shape[0])
    return LoraWeights(A.float().contiguous(), B.float().contiguous()), certified


def best_factors(matrix: Tensor, rank: int, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """B (out × r) and A (r × in), fp64, of the best approximation of a dense matrix, with √S on both sides.

    Of the given rank, or of as many ranks as it takes to keep this share of ‖matrix‖_F². A large matrix is decomposed
    in the subspace that powers of it pull its largest singular vectors into (Halko et al., arXiv 0909.4061), until
    what is kept no longer grows.
    """
    total = float(matrix.double().square().sum())
    U, S, Vt = _largest(matrix, rank, total)
    if energy is not None:
        while float(S.square().sum()) < energy * total * (1 - 1e-12) and len(S) < min(matrix.shape):
            U, S, Vt = _largest(matrix, 2 * len(S), total)
        rank = 1 + int((S.square().cumsum(0) < energy * total * (1 - 1e-12)).sum())
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def _largest(matrix: Tensor, rank: int, total: float) -> tuple[Tensor, Tensor, Tensor]:
    size = rank + _OVERSAMPLED
    if min(matrix.shape) <= max(_WHOLE, 2 * size):
        U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U[:, :rank], S[:rank], Vt[:rank]
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], size, generator=generator))[0]
    kept = 0.0
    for _ in range(_MOST_ROUNDS):
        rows = torch.linalg.qr(matrix.T @ Q)[0]
        Q, triangle = torch.linalg.qr(matrix @ rows)
        left, S, right = torch.linalg.svd(triangle.double())
        before, kept = kept, float(S[:rank].square().sum())
        if kept - before <= _SETTLED * total:
            break
    return (Q.double() @ left)[:, :rank], S[:rank], (right @ rows.double().T)[:rank]


def _publish(
    spec: ExtractSpec,
    weights: dict[str, LoraWeights],
    certified: dict[str, ModuleCertificate],
    target_modules: tuple[str, ...],
    others: dict[str, float],
) -> dict[str, Any]:
    rank = max(item.A.shape[0] for item in weights.values())
    document = certificate.document(certified, {"method": "extract", "left_out": others})
    # Scale 1 in every module, whatever its rank.
    made = Adapter(
        weights=weights,
        rank=rank,
        alpha=rank,
        base_model_name=spec.base_model_name or Path(spec.base_model).name,
        base_digest=base_files.digest(Path(spec.base_model)),
        target_modules=target_modules,
        alphas={name: item.A.shape[0] for name, item in weights.items() if item.A.shape[0] != rank},
    )
    lineage = {
        "method": "extract",
        "tuned_digest": base_files.digest(Path(spec.tuned_model)),
        "rank": spec.rank,
        "energy": spec.energy,
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    adapter.write(made, Path(spec.output), lineage=lineage, files={certificate.FILE: text})
    return {
        "method": "extract",
        "rank": rank,
        "modules": len(weights),
        "left_out": others,
        "certificate": document["totals"],
    }
