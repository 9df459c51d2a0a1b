"""Merging, compressing and exporting adapters: Luthier against PEFT, against the GEMM rate and against the disk.

    python benchmarks/merge.py                                a look, some minutes
    python benchmarks/merge.py --full --write                 what the README claims, in less than 9 minutes; on an
                                                              otherwise idle machine
    python benchmarks/merge.py --rows compress,export --gigabytes 13 --folder /a/disk

Rows: `stack` against PEFT's `cat`; `compress` of three adapters of rank 16 on one 2048 × 2048 module against PEFT's
`svd`; `floor`, the same on the shapes of a 7B model against the time that its multiplications take at the machine's
GEMM rate; `adapters`, how cost grows with their number; `export` of a whole model against copying its files. Ours and
the other take turns; figures are medians, ratios those of each round. Prints Markdown; `--write` keeps it and all
figures as JSON in benchmarks/results.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path


def main() -> None:
    options = _options()
    # Before numpy and torch start threads of their own.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"

    from benchmarks import _merge_compress, _merge_export, _merge_report, _merge_stack

    measures = {
        "stack": _merge_stack.stack,
        "compress": _merge_compress.compress,
        "floor": _merge_compress.floor,
        "adapters": _merge_stack.adapters,
        "export": _merge_export.export,
    }
    sections = []
    with tempfile.TemporaryDirectory(prefix="luthier-bench-", dir=options.folder) as folder:
        for row in options.rows:
            print(row, file=sys.stderr, flush=True)
            (own := Path(folder) / row).mkdir()
            sections.append(measures[row](own, options))
    text = _merge_report.markdown(sections, options)
    print(text)
    if options.write is not None:
        _merge_report.write(Path(__file__).parent / "results", options.write, sections, text)


def _options() -> argparse.Namespace:
    rows = ("stack", "compress", "floor", "adapters", "export")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(rows), help=",".join(rows))
    parser.add_argument("--full", action="store_true", help="more rounds, larger models")
    parser.add_argument("--rounds", type=int, help="of every row; 2, or 3 with --full")
    parser.add_argument("--threads", type=int, default=1, help="of everything but exports, which use all cores")
    parser.add_argument("--adapters", type=lambda text: [int(count) for count in text.split(",")], default=[1, 3, 8])
    parser.add_argument("--gigabytes", type=float, help="of the exported model; 1, or 2 with --full")
    parser.add_argument("--size", type=int, default=4096, help="hidden size of the 7B shapes, for dry runs")
    parser.add_argument(
        "--module", type=int, default=2048, help="size of the module that PEFT decomposes, for dry runs"
    )
    parser.add_argument("--folder", type=Path, help="where the files of the measurements lie: a disk with room")
    parser.add_argument("--write", nargs="?", const="", metavar="SUFFIX", help="keep the results")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(rows):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}")
    options.rounds = options.rounds or (3 if options.full else 2)
    options.gigabytes = options.gigabytes or (2.0 if options.full else 1.0)
    return options


if __name__ == "__main__":
    main()
