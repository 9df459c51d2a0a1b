"""Training on a GPU, in one call on a bare machine with torch and transformers.

    python -m benchmarks.gpu                                  every part, about 40 minutes of a GPU
    python -m benchmarks.gpu correct peers --write            these parts; table and figures into benchmarks/results
    python -m benchmarks.gpu --toy                            all of it at toy size; runs on a CPU, measures nothing
    python -m benchmarks.gpu --wheels gpu-wheels --data alpaca_data.json.gz --model smollm2

Base models have random weights made on the device. `--wheels` is a folder with the folders `base`, `unsloth` and
`torchtune` of wheels, which are put beside each other, not into one environment. Every part has a time of its own
(`--minutes` sets it for all that are named), runs in processes of its own, and what fails is a row of the table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import report
from benchmarks.gpu.documents import alpaca_lengths
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import FULL, TOY

RESULTS = Path(__file__).parent.parent / "results"


def main() -> None:
    options = _options()
    scale = TOY if options.toy else FULL
    with tempfile.TemporaryDirectory(prefix="luthier-gpu-", dir=options.folder) as name:
        folder = Path(name)
        _name_the_engine(folder / "site")
        lengths, how = alpaca_lengths(options.data, _tokenizer(options.model), 400 if options.toy else FULL.epoch)
        if options.toy:
            lengths = [(1 + prompt % 12, 1 + answer % 24) for prompt, answer in lengths]
        sites = _installed(options.wheels, folder) if options.wheels else {}
        device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        run = Run(device, scale, folder, lengths, options.model, options.data, sites)
        found = report.facts(run, how)
        stem = f"{datetime.now(UTC).date().isoformat()}-gpu{'-toy' if options.toy else ''}{options.suffix}"
        for part in options.parts or PARTS:
            _measure(run, part, options.minutes)
            # After each part: whoever stops this has what was measured.
            text = report.write(options.output or (RESULTS if options.write else folder), stem, run, found)
    print(text)
    bad = [row["name"] for row in run.rows.get("correct", []) if row["status"] != "ok"]
    sys.exit(f"not right: {', '.join(bad)}" if bad else 0)


def _measure(run: Run, part: str, minutes: float | None) -> None:
    work, seconds = PARTS[part]
    run.part, run.deadline = part, time.monotonic() + (60 * minutes if minutes else seconds)
    run.rows[part] = []
    try:
        work(run)
    except Exception as error:
        run.add({"name": part, "status": "failed", "why": f"{type(error).__name__}: {error}"})


def _installed(wheels: Path, folder: Path) -> dict[str, list[Path]]:
    """Folders for the path, by environment: all have `base`."""
    sites = {}
    for name in ("base", "unsloth", "torchtune"):
        files = [str(path) for path in sorted((wheels / name).glob("*.whl"))]
        if not files:
            continue
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(folder / name), *files], check=True)
        sites[name] = folder / name
    base = [sites["base"]] if "base" in sites else []
    return {"": base} | {name: [path, *base] for name, path in sites.items() if name != "base"}


def _name_the_engine(site: Path) -> None:
    """The engine writes its version into what it makes; where it is not installed, give it one."""
    try:
        version("luthier")
    except PackageNotFoundError:
        folder = site / "luthier-0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: luthier\nVersion: 0\n", encoding="utf-8")


def _tokenizer(folder: Path | None) -> Any:
    if folder is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    times = json.dumps({name: seconds for name, (_, seconds) in PARTS.items()})
    parser.add_argument("parts", nargs="*", help=f"some of these, with the seconds each may take: {times}")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--device", help='"cuda:0", "cpu" (default: the first GPU, or the CPU)')
    parser.add_argument("--minutes", type=float, help="for each part that runs")
    parser.add_argument("--wheels", type=Path, help="folder of folders of wheels: base, unsloth, torchtune")
    parser.add_argument("--data", type=Path, help="Alpaca's JSON, .gz or not (default: lengths drawn like Alpaca's)")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a folder; its tokenizer alone serves for lengths")
    parser.add_argument("--folder", type=Path, help="where 16 GB of weights may lie (default: the temporary folder)")
    parser.add_argument(
        "--output", type=Path, help="where table and figures are written; `--write`: benchmarks/results"
    )
    parser.add_argument("--write", action="store_true", help="write them to benchmarks/results")
    parser.add_argument("--suffix", default="", help="of the files' names")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    main()
