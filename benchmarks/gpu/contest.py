"""The peers: each in turns of a few steps with ours, in the same run, on the same tokens.

Two contenders share a device where it has room for both; else each has it alone, one right after the other.
"""

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
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
class Measured:
    """Steps of one contender, as its gate tells them; the first `warm_up` are not timed."""

    steps: list[dict[str, Any]]
    warm_up: int

    def runs(self, run: int) -> list[list[dict[str, Any]]]:
        timed = self.steps[self.warm_up :]
        return [timed[start : start + run] for start in range(0, len(timed), run)]


def lora_peers(run: Run) -> None:
    """Every peer against our LoRA bf16 on 8B, steps of Alpaca's lengths."""
    for peer in PEERS:
        if "none" in peer.quantizations:
            _pair(run, "none", peer)


def qlora_peers(run: Run) -> None:
    """The same for QLoRA; first our QLoRA against our own LoRA."""
    _pair(run, "nf4", Peer("our own LoRA bf16", "ours.train", ({},)), "none")
    for peer in PEERS:
        if "nf4" in peer.quantizations:
            _pair(run, "nf4", peer)


def _pair(run: Run, quantization: str, peer: Peer, quantization_of_peer: str | None = None) -> None:
    kind = "LoRA bf16" if quantization == "none" else "QLoRA NF4"
    name = f"{run.scale.eight}, {kind} r {run.scale.ranks[0]}, ours against {peer.title}"
    if run.left < 5:
        run.add({"name": name, "status": "not run", "why": "the part's time was used up"})
        return
    try:
        config = _config(run, peer.written)
        # On half of what is left, so that one peer that hangs does not cost the others their turn.
        turn = Turn(run, time.monotonic() + max(10.0, run.left / 2))
        # Dequantising once is no choice that a peer has.
        own = config | {"quantization": quantization, "variant": {"once": False if quantization == "nf4" else None}}
        other = config | {"quantization": quantization_of_peer or quantization}
        ours, theirs, facts = turn.measured(own, peer, other)
        run.add({"name": name, **_row(run, config, ours, theirs), **facts})
    except (Failed, OSError) as failure:
        run.add({"name": name, "status": "not run", "why": str(failure)})


@dataclass(frozen=True, slots=True)
class Turn:
    """The measurement of one pair, until `deadline` (of time.monotonic)."""

    run: Run
    deadline: float

    def measured(self, own: Row, peer: Peer, other: Row) -> tuple[Measured, Measured, Row]:
        """Ours, the peer's, and how: in turns where the device has room for both, else one after the other.

        The peer begins, alone on the device, so that it has the memory it wants.
        """
        with ExitStack() as stack:
            child, theirs, variant = self._first(stack, peer, other)
            facts = {"variant": variant, "in turns": True}
            try:
                mine, limited = self._begun(stack, "ours.train", own)
                ours = self._warm(mine)
                if not limited:
                    self._interleave(mine, ours, child, theirs)
                    return ours, theirs, facts
            except Failed as failure:
                facts["together"] = str(failure)
        return *self.apart(own, peer, other | {"variant": variant}), facts | {"in turns": False}

    def apart(self, own: Row, peer: Peer, other: Row) -> tuple[Measured, Measured]:
        """One after the other, each alone on the device."""
        ours, theirs = (
            self._alone(task, config, environment)
            for task, config, environment in (("ours.train", own, ""), (peer.task, other, peer.environment))
        )
        return ours, theirs

    def _alone(self, task: str, config: Row, environment: str) -> Measured:
        scale = self.run.scale
        with ExitStack() as stack:
            child, _ = self._begun(stack, task, config, environment)
            found = self._warm(child)
            for _ in range(scale.rounds):
                found.steps += child.run(scale.run, self.deadline)["steps"]
            return found

    def _interleave(self, mine: Child, ours: Measured, child: Child, theirs: Measured) -> None:
        turns = [(mine, ours), (child, theirs)]
        for number in range(self.run.scale.rounds):
            for process, found in turns if number % 2 else turns[::-1]:
                found.steps += process.run(self.run.scale.run, self.deadline)["steps"]

    def _begun(self, stack: ExitStack, task: str, config: Row, environment: str = "") -> tuple[Child, bool]:
        """A loaded contender, and whether it says that it was short of memory."""
        child = stack.enter_context(self.run.child(task, config, environment))
        return child, bool(child.answer(self.deadline).get("limited"))

    def _first(self, stack: ExitStack, peer: Peer, config: Row) -> tuple[Child, Measured, dict[str, Any]]:
        """The first variant that makes its first steps."""
        said = []
        for variant in peer.variants:
            with ExitStack() as own:
                try:
                    child, _ = self._begun(own, peer.task, config | {"variant": variant}, peer.environment)
                    measured = self._warm(child)
                except Failed as failure:
                    said.append(f"{variant}: {failure}")
                    continue
                stack.push(own.pop_all())
                return child, measured, variant
        raise Failed("; ".join(said))

    def _warm(self, child: Child) -> Measured:
        steps = self.run.scale.run
        return Measured(child.run(steps, self.deadline)["steps"], steps)


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


def _row(run: Run, config: Row, ours: Measured, peer: Measured) -> Row:
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
        "step s, ours / peer": [
            round(statistics.median(step["seconds"] for step in item.steps), 4) for item in (ours, peer)
        ],
    }
    if "allocated" in ours.steps[-1]:
        for key in ("allocated", "reserved"):
            row[f"{key} GB, ours / peer"] = [round(item.steps[-1].get(key, 0) / GB, 2) for item in (ours, peer)]
    return row
