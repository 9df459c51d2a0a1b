"""A whole model with three adapters in its weights, against a copy of its files; both from a cold page cache."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks import _merge_adapters as random_adapters
from benchmarks._merge_report import Section, clock, ratio, take_turns
from lora_engine.adapter_header import WEIGHTS
from lora_engine.convert import convert_gguf, demo_gguf

RANK = 16
WHOLE = 3  # adapters of the export that is timed with its parity too
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_MIB = 1 << 20


def export(folder: Path, options: argparse.Namespace) -> Section:
    """Seconds to write the merged model until it is on the disk, and the peak of memory."""
    base, largest = _model(folder, options)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    shapes = random_adapters.seven_billion(_layers(options), options.size)
    sources = [
        random_adapters.save_ours(folder / f"source-{seed}", seed, shapes, RANK)
        for seed in range(max(options.adapters))
    ]
    section = Section(
        "Export",
        f"A model of {size / 1e9:.2f} GB (bf16, layers of Llama 7B's shapes) with adapters of rank {RANK} on all "
        f"linear layers, merged into bf16 safetensors with {os.cpu_count()} threads, against copying its files "
        "(`sendfile`). Both from a cold page cache and until everything is on the disk. A process of its own for each "
        "export; memory is its peak above what it held after the imports. Bound: twice the largest tensor, the "
        "adapters' files and 256 MiB. The whole export writes configs and tokenizer too, and compares "
        "log-probabilities from disk.",
        ["adapters", "export", "copy", "of the copy's rate", "whole export with parity", "peak", "bound"],
    )
    for count in options.adapters:
        own = sources[:count]
        spec = _spec(base, own, folder / "merged")
        answers: list[dict[str, Any]] = []
        streamed, copied = partial(_streamed, spec, answers), partial(_copy, base, folder / "copied")
        seconds = take_turns(options.rounds, export=streamed, copy=copied)
        whole = _child(spec, "export") if count == WHOLE else None
        factors = sum((path / WEIGHTS).stat().st_size for path in own)
        bound = 2 * largest + factors + 256 * _MIB
        rate = ratio(seconds["copy"], seconds["export"])
        peak = max(answer["peak_bytes"] for answer in (*answers, *([whole] if whole else [])))
        section.rows.append(
            [
                str(count),
                clock(seconds["export"]),
                clock(seconds["copy"]),
                f"{rate:.0%}",
                clock([whole["seconds"]]) if whole else "",
                f"{peak / _MIB:.0f} MiB",
                f"{bound / _MIB:.0f} MiB",
            ]
        )
        section.figures[str(count)] = {
            "seconds": seconds,
            "rate": rate,
            "whole": whole,
            "peak_bytes": peak,
            "bound_bytes": bound,
            "model_bytes": size,
        }
    return section


def _layers(options: argparse.Namespace) -> int:
    """So many that the model has about the size that was asked for."""
    shapes = random_adapters.seven_billion(1, options.size).values()
    layer = 2 * sum(outputs * inputs for outputs, inputs in shapes)
    return max(1, round(options.gigabytes * 1e9 / layer))


def _model(folder: Path, options: argparse.Namespace) -> tuple[Path, int]:
    """Folder of a model with random weights and SmolLM2's tokenizer; bytes of its largest tensor."""
    demo, base = folder / "demo", folder / "base"
    convert_gguf(demo_gguf(), demo)
    base.mkdir()
    for name in _TOKENIZER:
        if (demo / name).exists():
            shutil.copy(demo / name, base / name)
    vocabulary = json.loads((demo / "config.json").read_text())["vocab_size"]
    shutil.rmtree(demo)
    size, layers = options.size, _layers(options)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=vocabulary, hidden_size=size, num_hidden_layers=layers,
        intermediate_size=size * 11008 // 4096, num_attention_heads=32, num_key_value_heads=32, dtype="bfloat16",
        tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(base)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    names: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, base / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, file))

    ones = torch.ones(size, dtype=torch.bfloat16)
    save(1, {"model.embed_tokens.weight": random(vocabulary, size), "model.norm.weight": ones})
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {name: shape for name, shape in random_adapters.seven_billion(layers, size).items() if prefix in name}
        norms = {f"{prefix}{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        save(layer + 2, norms | {f"{name}.weight": random(*shape) for name, shape in shapes.items()})
    index = {"metadata": {}, "weight_map": names}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base, 2 * size * max(vocabulary, config.intermediate_size)


def _spec(base: Path, sources: list[Path], output: Path) -> dict[str, Any]:
    weighted = [{"path": str(path), "weight": 1 / len(sources)} for path in sources]
    return {
        "base_model": str(base),
        "adapters": weighted,
        "output": str(output),
        "export": {"format": "merged", "dtype": "bf16"},
    }


def _child(spec: dict[str, Any], what: str) -> dict[str, Any]:
    """The answer of a process that exports; what it wrote is removed."""
    for folder in (spec["base_model"], *(source["path"] for source in spec["adapters"])):
        _forget(Path(folder))
    command = [sys.executable, "-m", "benchmarks._merge_export", what]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, input=json.dumps(spec), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    shutil.rmtree(spec["output"], ignore_errors=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _streamed(spec: dict[str, Any], answers: list[dict[str, Any]]) -> float:
    """Seconds, without the start of the process and its imports."""
    answers.append(_child(spec, "stream"))
    return float(answers[-1]["seconds"])


def _copy(source: Path, target: Path) -> float:
    """Seconds until the bytes of the files are on the disk."""
    _forget(source)
    target.mkdir()
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
    for path in sorted(target.iterdir()):
        _sync(path)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _stream(spec: Any) -> None:
    """The weights alone, as `export` writes them."""
    from lora_engine.exporting import base as bases
    from lora_engine.exporting import merged
    from lora_engine.exporting.deltas import Deltas

    output = Path(spec.output)
    output.mkdir()
    base, deltas = bases.open_base(Path(spec.base_model)), Deltas(spec.adapters)
    pieces = bases.pieces(base, deltas, spec.export.dtype, "none")
    merged.write(pieces, deltas, output, spec.export.shard_bytes, lambda *_: None)
    for path in sorted(output.iterdir()):
        _sync(path)


def main() -> None:
    """The child: one export of the spec on stdin; seconds and peak of memory on stdout."""
    from lora_engine import machine
    from lora_engine.exporting.config import ExportSpec
    from lora_engine.exporting.export import export as whole
    from lora_engine.fields import from_mapping

    spec = from_mapping(ExportSpec, json.load(sys.stdin))
    device = torch.device("cpu")
    machine.forget_peak(device)
    before = machine.resident_bytes(device)
    started = time.perf_counter()
    if sys.argv[1] == "stream":
        _stream(spec)
    else:
        whole(spec)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": machine.peak_bytes(device) - before}))


if __name__ == "__main__":
    main()
