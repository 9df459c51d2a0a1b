"""``python -m service.cli``, the same as ``luthier``."""

from service.cli import main

main()
