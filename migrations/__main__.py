"""``python -m migrations upgrade`` on the configured database; ``check`` on a new, empty one."""

import sys
import tempfile
from pathlib import Path

import migrations
from service.settings import Settings


def main(arguments: list[str]) -> int:
    if arguments == ["upgrade"]:
        migrations.upgrade(Settings().database_url)
        return 0
    if arguments == ["check"]:
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'check.db'}"
            migrations.upgrade(url)
            differences = migrations.check(url)
        sys.stderr.writelines(f"the migrations do not make these tables: {line}\n" for line in differences)
        return 1 if differences else 0
    sys.stderr.write("usage: python -m migrations upgrade|check\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
