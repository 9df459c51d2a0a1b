"""The engine alone, without the service.

    python -m lora_engine train spec.json [--resume]     progress to stderr, metrics as JSON to stdout
    python -m lora_engine plan spec.json                 what the job would do and need, as JSON
    python -m lora_engine describe FOLDER                architecture and linear layers of a base model, as JSON

An engine error ends it with exit code 2 and one line.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_engine import strict_json
from lora_engine.config import TrainSpec, from_mapping, to_mapping
from lora_engine.errors import CheckpointError, EngineError, SpecError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], dict[str, Any]] = options.command
    try:
        print(json.dumps(command(options), indent=1))
    except EngineError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter from a spec file."""
    from lora_engine.train import Training

    spec = _read_spec(options.spec)
    with Training(spec, _load(spec)) as training:
        if options.resume:
            _resume(training, Path(spec.output) / "checkpoints")
        for step in training.steps():
            validation = "" if step.validation_loss is None else f"  validation loss {step.validation_loss:.4f}"
            print(
                f"step {step.step}/{step.total_steps}  loss {step.loss:.4f}  rate {step.learning_rate:.2e}  "
                f"{step.seconds:.2f} s{validation}",
                file=sys.stderr,
            )
            if step.checkpoint_due:
                training.checkpoint()
        return training.finish()


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """The plan of a spec file; nothing is trained."""
    from lora_engine.train import Training

    spec = _read_spec(options.spec)
    with Training(spec, _load(spec)) as training:
        return to_mapping(training.plan)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What a base model's config says."""
    from lora_engine.base_model import describe

    return to_mapping(describe(options.folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_engine", description=train.__doc__)
    commands = parser.add_subparsers(required=True)
    for command in (train, plan):
        subparser = commands.add_parser(command.__name__, help=command.__doc__)
        subparser.add_argument("spec", type=Path)
        subparser.set_defaults(command=command, resume=False)
        if command is train:
            subparser.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint")
    subparser = commands.add_parser("describe", help=describe.__doc__)
    subparser.add_argument("folder", type=Path)
    subparser.set_defaults(command=describe)
    return parser


def _read_spec(path: Path) -> TrainSpec:
    try:
        return from_mapping(TrainSpec, strict_json.loads(path.read_bytes()))
    except (OSError, strict_json.StrictJSONError) as error:
        raise SpecError(f"{path}: {error}") from None


def _load(spec: TrainSpec) -> Any:
    from lora_engine import base_files, base_model

    folder = Path(spec.base_model)
    if not folder.is_dir():
        raise SpecError(f"base_model: {spec.base_model} is not a folder", field="base_model")
    return base_model.load(
        folder,
        quantization=spec.training.quantization,
        compute_dtype=spec.training.compute_dtype,
        device=spec.device,
        digest=base_files.digest(folder),
    )


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
