"""Which part of their modules the inputs of targets run: `python -m tests.fuzz.reached DIRECTORY TARGET…` prints it, 0 … 1.

A process of its own, which imports what it measures after it has begun to: so lines that run once, at the import, count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import coverage

_ROOT: Final = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run everything in the directory that is kept for each of the targets."""
    directory, *names = sys.argv[1:]
    measured = coverage.Coverage(data_file=None, source=[str(_ROOT / "zfabric")], config_file=False)
    measured.start()
    from tests.fuzz.targets import TARGETS, run

    modules: set[str] = set()
    for name in names:
        target = TARGETS[name]
        modules.update(target.modules)
        for path in sorted(Path(directory, name).iterdir()):
            run(target, path.read_bytes())
    measured.stop()
    places = [_ROOT / module.replace(".", "/") for module in modules]
    lines = missing = 0
    for file in measured.get_data().measured_files():
        if any(place in Path(file).parents for place in places):
            _, statements, _, missed, _ = measured.analysis2(file)
            lines, missing = lines + len(statements), missing + len(missed)
    print(f"{(lines - missing) / lines:.3f}")


if __name__ == "__main__":
    main()
