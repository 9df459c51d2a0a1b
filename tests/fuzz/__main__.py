"""Fuzz one parser with atheris: ``python -m tests.fuzz rows -max_total_time=60``."""

import logging
import sys

import atheris

with atheris.instrument_imports(include=["lora_engine", "python_multipart", "service"]):
    from tests.fuzz.parsers import TARGETS, attempt

logging.disable()
name = sys.argv.pop(1)
if name not in TARGETS:
    sys.exit(f"unknown target {name}; there are {', '.join(TARGETS)}")
atheris.Setup(sys.argv, lambda data: attempt(name, data))
atheris.Fuzz()
