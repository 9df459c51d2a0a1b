"""One contender in a process of its own: ``python -m benchmarks._train_worker KIND CONFIG READER WRITER``.

KIND names a module `_train_KIND`, whose `train` is called. CONFIG is a JSON file that `benchmarks/train.py` writes,
READER and WRITER are inherited file descriptors. It may run in an environment where Luthier is not installed.
"""

import importlib
import json
import sys
from pathlib import Path

from benchmarks._train_gate import Gate


def main() -> None:
    kind, config, reader, writer = sys.argv[1:]
    gate = Gate(int(reader), int(writer))
    module = importlib.import_module(f"benchmarks._train_{kind}")
    module.train(json.loads(Path(config).read_text(encoding="utf-8")), gate)


if __name__ == "__main__":
    main()
