"""The forms in which models are published, from benchmarks/source_formats.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import source_formats as source_formats
