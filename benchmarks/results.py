"""RESULTS.md holds what the benchmarks measured last: one section a script, rewritten by it."""

import os
import platform
import re
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# Results

Written by the scripts in this folder, each its own section; what a script measures and how is in
its docstring.
"""


def write_section(name: str, text: str, file: Path = RESULTS) -> None:
    """Replace the section `name` of the file, or add it at the end. `text` is markdown."""
    content = file.read_text(encoding="utf-8") if file.exists() else TITLE
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}\n"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}\n", re.DOTALL)
    if pattern.search(content):
        content = pattern.sub(lambda _: section, content)
    else:
        content = f"{content.rstrip()}\n\n{section}"
    file.write_text(content, encoding="utf-8")


def machine() -> str:
    """The date and the processor that numbers were measured on."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = [platform.processor()]
    return f"{date.today()}, {os.cpu_count()} cores of {names[0] if names else 'unknown'}"
