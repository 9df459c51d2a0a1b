"""Whether what is measured is right: our steps against PEFT's and fp32, packed against padded, resume, merge, bytes."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import bases
from benchmarks.gpu.documents import documents
from benchmarks.gpu.jobs import arranged, spec
from lora_engine import adapter, lora, passes
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig
from lora_engine.data import Document
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from lora_engine.train import Training

STREAMS = True
Tell = Callable[..., None]
_RANK, _ALPHA = 8, 16.0
_LENGTHS = [(9, 60), (30, 14), (5, 33), (61, 100), (12, 3), (17, 40)]
_WEIGHTS = (0.7, -0.4)
# Ours may be so many times as far from fp32 as PEFT's own bf16 is, or this far.
_TIMES, _CLOSE = 1.5, 1e-3
# Of two computations in bf16 from each other: each is up to 1e-2 from fp32.
_ROUNDING = 2e-2


def all_of_it(config: dict[str, Any], tell: Tell) -> None:
    """A row for each check; one that raises is a failed row."""
    device = torch.device(config["device"])
    folder, output = Path(config["model"]), Path(config["output"])
    for quantization in ("none", "nf4"):
        kind = "LoRA bf16" if quantization == "none" else "QLoRA NF4"
        base = bases.ours(folder, quantization, device)
        found = documents("alpaca", len(_LENGTHS), base.model.config.vocab_size, _LENGTHS)
        checks: dict[str, Callable[[], dict[str, Any]]] = {
            "a step against PEFT": lambda base=base, found=found: _against_peft(base, found),
            "packed against padded": lambda base=base, found=found: _packed_and_padded(base, found),
            "an evaluation changes no gradient": lambda base=base, found=found: _evaluation(base, found),
            "dequantised once": lambda base=base, found=found: _dequantised_once(base, found),
            "two runs, as users run it": lambda base=base: _two_runs(base, output),
            "stopped and resumed": lambda base=base: _resumed(base, output),
            "two runs, deterministic mode": lambda base=base: _deterministic(lambda: _two_runs(base, output)),
            "stopped and resumed, deterministic mode": lambda base=base: _deterministic(lambda: _resumed(base, output)),
            "a stack of two adapters": lambda base=base: _merged(base, output),
        }
        for name, check in checks.items():
            try:
                row = check()
            except Exception as error:
                row = {"status": "failed", "why": f"{type(error).__name__}: {str(error)[:300]}"}
            tell(row={"name": f"{kind}: {name}", **row})


def _against_peft(base: BaseModel, found: Sequence[Document]) -> dict[str, Any]:
    """Loss and gradients of one step, both against fp32 over the same weights."""
    with_b = _factors(base)
    ours = _ours(base, found, with_b)
    exact = _peft(base, found, with_b, exact=True)
    theirs = _peft(base, found, with_b, exact=False)
    own, other = (_distance(item[1], exact[1]) for item in (ours, theirs))
    loss_own, loss_other = (abs(item[0] / exact[0] - 1) for item in (ours, theirs))
    good = own <= max(_TIMES * other, _CLOSE) and loss_own <= max(_TIMES * loss_other, _CLOSE)
    return {
        "status": _verdict(good),
        "error": own,
        "the other's": other,
        "cosine": float(torch.nn.functional.cosine_similarity(ours[1], theirs[1], 0)),
        "loss error": loss_own,
        "the other's loss error": loss_other,
    }


def _packed_and_padded(base: BaseModel, found: Sequence[Document]) -> dict[str, Any]:
    factors = _factors(base)
    packed, padded = (_ours(base, found, factors, run) for run in (passes.PackedPass, passes.PaddedPass))
    error = _distance(packed[1], padded[1])
    return {"status": _verdict(error < _ROUNDING), "error": error, "loss error": abs(packed[0] / padded[0] - 1)}


def _evaluation(base: BaseModel, found: Sequence[Document]) -> dict[str, Any]:
    factors = _factors(base)
    before = _ours(base, found, factors)[1]
    error = _distance(_ours(base, found, factors, evaluate=True)[1], before)
    return {"status": _verdict(error < _ROUNDING), "error": error}


def _dequantised_once(base: BaseModel, found: Sequence[Document]) -> dict[str, Any]:
    if base.quantization == "none":
        return {"status": "ok", "why": "nothing is quantised"}
    factors = _factors(base)
    anew, once = (_ours(base, found, factors, once=once)[1] for once in (False, True))
    again = _ours(base, found, factors)[1]
    errors = _distance(once, anew), _distance(again, anew)
    return {"status": _verdict(max(errors) < _ROUNDING), "error": errors[0], "undone again": errors[1]}


def _two_runs(base: BaseModel, output: Path) -> dict[str, Any]:
    one, other = (_trained(base, output, "run", 4) for _ in range(2))
    return _same(one, other)


def _resumed(base: BaseModel, output: Path) -> dict[str, Any]:
    whole = _trained(base, output, "whole", 4)
    _trained(base, output, "parts", 4, stop=2)
    return _same(whole, _trained(base, output, "parts", 4, resume=True))


def _deterministic(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    try:
        row = check()
    finally:
        torch.use_deterministic_algorithms(False)
    return row | {"status": _verdict(row["bytes"] == "equal")}


def _merged(base: BaseModel, output: Path) -> dict[str, Any]:
    """The stack's product against the weighted sum of the sources' in fp64."""
    folders = []
    for seed in range(2):
        _trained(base, output, f"source-{seed}", 3, seed=seed)
        folders.append(output / f"source-{seed}" / "adapter")
    sources = [WeightedAdapter(path=str(path), weight=weight) for path, weight in zip(folders, _WEIGHTS, strict=True)]
    target = output / f"merged-{base.quantization}"
    merge(MergeSpec(adapters=sources, output=str(target)))
    read = [adapter.read(folder) for folder in (*folders, _adapter_folder(target))]
    error = 0.0
    for module in read[0].weights:
        parts = [weight * adapter.delta(item, module) for weight, item in zip(_WEIGHTS, read[:2], strict=True)]
        wanted = sum(parts[1:], parts[0])
        error = max(error, float((adapter.delta(read[2], module) - wanted).norm() / wanted.norm()))
    return {"status": _verdict(error < 1e-6), "error": error}


def _adapter_folder(folder: Path) -> Path:
    return next(path.parent for path in sorted(folder.rglob("adapter_config.json")))


def _factors(base: BaseModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A as we draw it and a B that is not zero, so that A has a gradient; fp32 on the CPU, as bf16 has them."""
    adapted = lora.attach(base, LoraConfig(rank=_RANK, alpha=_ALPHA), 0)
    adapted.detach()
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, layer in adapted.layers.items():
        A, B = layer.slots[0].A, layer.slots[0].B
        b = 0.01 * torch.randn(B.shape, generator=generator)
        found[name] = A.detach().cpu().bfloat16().float(), b.bfloat16().float()
    return found


def _ours(
    base: BaseModel,
    found: Sequence[Document],
    factors: dict[str, tuple[Tensor, Tensor]],
    make: Any = passes.PackedPass,
    *,
    evaluate: bool = False,
    once: bool = False,
) -> tuple[float, Tensor]:
    """(loss per target, all gradients in one, A before B of each module in turn; fp32 on the CPU)."""
    adapted = lora.attach(base, LoraConfig(rank=_RANK, alpha=_ALPHA), 0)
    try:
        for name, layer in adapted.layers.items():
            slot = layer.slots[0]
            slot.A.data.copy_(factors[name][0])
            slot.B.data.copy_(factors[name][1])
        adapted.refresh()
        run = make(adapted)
        run.keep_dequantized(once)
        batches = list(run.batches(found, 256))
        if evaluate:
            for batch in run.batches(found, 256):
                run.loss(batch)
        targets = sum(document.trained_tokens for document in found)
        loss = sum(run.gradients(batch, targets, None) for batch in batches)
        slots = [adapted.layers[name].slots[0] for name in factors]
        gradients = [factor.grad.flatten().cpu() for slot in slots for factor in (slot.A, slot.B)]  # type: ignore[union-attr]
        run.keep_dequantized(False)
        return loss, torch.cat(gradients)
    finally:
        adapted.detach()


def _peft(
    base: BaseModel, found: Sequence[Document], factors: dict[str, tuple[Tensor, Tensor]], *, exact: bool
) -> tuple[float, Tensor]:
    """The same by PEFT over transformers and autograd: in fp32, or as people run it (bf16 autocast, bitsandbytes)."""
    import peft

    model = bases.theirs(base.folder, "none" if exact else base.quantization, base.device)
    if exact:
        model = model.float()
        model.load_state_dict(bases.dequantised(base), strict=False)
    config = peft.LoraConfig(r=_RANK, lora_alpha=int(_ALPHA), target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.train()
    parameters = dict(model.named_parameters())
    own = [
        parameters[f"base_model.model.{name}.lora_{factor}.default.weight"] for name in factors for factor in ("A", "B")
    ]
    with torch.no_grad():
        for parameter, value in zip(own, (item for pair in factors.values() for item in pair), strict=True):
            parameter.copy_(value)
    targets = sum(document.trained_tokens for document in found)
    total = 0.0
    for document in found:
        ids = document.ids.long().to(base.device)
        labels = torch.where(document.trained.to(base.device), ids, -100)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=not exact):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[1:], reduction="sum") / targets
        loss.backward()
        total += float(loss)
    return total, torch.cat([parameter.grad.float().flatten().cpu() for parameter in own])


def _trained(
    base: BaseModel, output: Path, name: str, steps: int, *, stop: int = 0, resume: bool = False, seed: int = 0
) -> Tensor:
    """The masters after so many steps, on the CPU; the adapter is written where the last step was made."""
    lengths = [(5, 40 + 7 * (number % 5)) for number in range(4 * steps)]
    found = documents("alpaca", len(lengths), base.model.config.vocab_size, lengths, seed)
    own = output / name
    job_spec = spec(
        base, own, {"rank": _RANK, "alpha": _ALPHA}, {"global_batch": 4, "max_steps": steps, "seed": seed}
    )  # fmt: skip
    with arranged(base, found):
        job = Training(job_spec, base)
    with job:
        if resume:
            job.resume(max((own / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime))
        for step in job.steps():
            if step.step == stop:
                job.checkpoint()
                break
        else:
            job.finish()
        return job._adapted.parameters.cpu().clone()


def _same(one: Tensor, other: Tensor) -> dict[str, Any]:
    digests = [hashlib.sha256(item.numpy().tobytes()).hexdigest() for item in (one, other)]
    error = _distance(other, one)
    return {
        "status": _verdict(error < _ROUNDING),
        "bytes": "equal" if digests[0] == digests[1] else "differ",
        "error": error,
    }


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _verdict(good: bool) -> str:
    return "ok" if good else "failed"
