"""The peers: each in turns of a few steps with ours, in the same run, on the same tokens."""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks._train_figures import Spread
from benchmarks._train_processes import Failed
from benchmarks.gpu import bases
from benchmarks.gpu.child import Child
from benchmarks.gpu.documents import documents, examples_a_step
from benchmarks.gpu.jobs import GB
from benchmarks.gpu.run import Row, Run
from benchmarks.gpu.shapes import ALPACA


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is measured.

    Attributes:
        variants: tried in turn, until one gets through its first steps.
        environment: of its packages. `written`: it loads from a folder with weights.
    """

    title: str
    task: str
    variants: tuple[dict[str, Any], ...]
    environment: str = ""
    written: bool = False
    quantizations: tuple[str, ...] = ("none", "nf4")


_RECOMPUTED = ({"checkpointing": False}, {"checkpointing": True})
PEERS = (
    Peer("PEFT + Trainer, tuned", "peers.tuned", _RECOMPUTED),
    Peer("PEFT + Trainer, as written", "peers.stock", ({"checkpointing": True, "kbit": True},), quantizations=("nf4",)),
    Peer("PEFT + Trainer, as written", "peers.stock", _RECOMPUTED, quantizations=("none",)),
    Peer("Unsloth", "others.unsloth", ({"checkpointing": False}, {"checkpointing": "unsloth"}), "unsloth", True),
    Peer("PEFT tuned, with Liger", "peers.tuned", tuple(item | {"liger": True} for item in _RECOMPUTED)),
    Peer("torchtune", "others.torchtune", ({},), "torchtune", True, ("none",)),
    Peer("LitGPT", "others.litgpt", ({},), "torchtune", True, ("none",)),
)


@dataclass(slots=True)
class _Measured:
    steps: list[dict[str, Any]] = field(default_factory=list)
    warm_up: int = 0

    def runs(self, run: int) -> list[list[dict[str, Any]]]:
        timed = self.steps[self.warm_up :]
        return [timed[start : start + run] for start in range(0, len(timed), run)]


def contest(run: Run) -> None:
    """Every peer against ours on 8B, packed steps of Alpaca's lengths; then QLoRA against our own LoRA."""
    for quantization in ("none", "nf4"):
        for peer in PEERS:
            if quantization in peer.quantizations:
                _pair(run, quantization, peer)
        if quantization == "nf4":
            own = Peer("our own LoRA bf16", "ours.train", ({"once": None},))
            _pair(run, quantization, own, quantization_of_peer="none")


def _pair(run: Run, quantization: str, peer: Peer, quantization_of_peer: str | None = None) -> None:
    kind = "LoRA bf16" if quantization == "none" else "QLoRA NF4"
    name = f"{run.scale.eight}, {kind} r {run.scale.ranks[0]}, ours against {peer.title}"
    if run.left < 5:
        run.add({"name": name, "status": "not run", "why": "the part's time was used up"})
        return
    try:
        run.add({"name": name, **_measured(run, quantization, peer, quantization_of_peer or quantization)})
    except (Failed, OSError) as failure:
        run.add({"name": name, "status": "not run", "why": str(failure)})


def _measured(run: Run, quantization: str, peer: Peer, quantization_of_peer: str) -> Row:
    scale = run.scale
    config = _config(run, peer.written)
    # On half of what is left, so that one peer that hangs does not cost the others their turn.
    deadline = time.monotonic() + max(10.0, run.left / 2)
    with ExitStack() as stack:
        ours = _begun(
            run, stack, "ours.train", config | {"quantization": quantization, "variant": {"once": None}}, deadline
        )
        other, variant = _first(run, stack, peer, config | {"quantization": quantization_of_peer}, deadline)
        found = {"ours": (ours, _warm(ours, scale.run, deadline)), "peer": (other[0], other[1])}
        for number in range(scale.rounds):
            for key in ("ours", "peer") if number % 2 else ("peer", "ours"):
                child, kept = found[key]
                kept.steps += child.run(scale.run, deadline)["steps"]
    return _row(run, config, found["ours"][1], found["peer"][1], variant)


def _begun(run: Run, stack: ExitStack, task: str, config: Row, deadline: float, environment: str = "") -> Child:
    child = stack.enter_context(run.child(task, config, environment))
    child.answer(deadline)  # loaded
    return child


def _first(
    run: Run, stack: ExitStack, peer: Peer, config: Row, deadline: float
) -> tuple[tuple[Child, _Measured], dict[str, Any]]:  # fmt: skip
    """The first variant that makes its first steps."""
    said = []
    for variant in peer.variants:
        with ExitStack() as own:
            try:
                child = _begun(run, own, peer.task, config | {"variant": variant}, deadline, peer.environment)
                measured = _warm(child, run.scale.run, deadline)
            except Failed as failure:
                said.append(f"{variant}: {failure}")
                continue
            stack.push(own.pop_all())
            return (child, measured), variant
    raise Failed("; ".join(said))


def _warm(child: Child, steps: int, deadline: float) -> _Measured:
    return _Measured(child.run(steps, deadline)["steps"], steps)


def _config(run: Run, written: bool) -> Row:
    from benchmarks.gpu.parts import written as write

    scale = run.scale
    folder = run.model(scale.eight)
    initial = run.folder / f"initial-{scale.ranks[0]}.safetensors"
    if not initial.exists():
        bases.write_initial(initial, folder, scale.ranks[0])
    if written:
        write(run, scale.eight)
    examples = examples_a_step(ALPACA, scale.tokens, run.lengths)
    return {
        "model": str(folder),
        "shape": scale.eight,
        "facts": run.facts(scale.eight),
        "initial": str(initial),
        "rank": scale.ranks[0],
        "alpha": 2 * scale.ranks[0],
        "length": ALPACA,
        "examples": examples,
        # A step more than are asked for: a contender that has made its last one would end.
        "steps": scale.run * (scale.rounds + 1) + 1,
        "sequence_length": 2048,
        "seed": 0,
    }


def _row(run: Run, config: Row, ours: _Measured, peer: _Measured, variant: dict[str, Any]) -> Row:
    size = config["examples"]
    found = documents(ALPACA, size * len(ours.steps), config["facts"]["vocab_size"], run.lengths)
    tokens = [sum(map(len, found[start : start + size])) for start in range(0, len(found), size)]
    seconds = [[sum(step["seconds"] for step in part) for part in item.runs(run.scale.run)] for item in (ours, peer)]
    by = Spread.of([other / own for own, other in zip(*seconds, strict=True)])
    timed = sum(tokens[ours.warm_up :])
    pairs = zip(ours.steps, peer.steps, strict=True)
    row: Row = {
        "ours tokens/s": round(timed / sum(seconds[0])),
        "peer tokens/s": round(timed / sum(seconds[1])),
        "peer's time by ours": round(by.median, 3),
        "quartiles": [round(by.low, 3), round(by.high, 3)],
        "loss difference": round(max(abs(one["loss"] / other["loss"] - 1) for one, other in pairs), 5),
        "variant": variant,
        "step s, ours / peer": [
            round(statistics.median(step["seconds"] for step in item.steps), 4) for item in (ours, peer)
        ],
    }
    if "allocated" in ours.steps[-1]:
        for key in ("allocated", "reserved"):
            row[f"{key} GB, ours / peer"] = [round(item.steps[-1].get(key, 0) / GB, 2) for item in (ours, peer)]
    return row
