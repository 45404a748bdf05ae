"""List the benchmarks, or run some or all of them.

    benchmarks/run.py --list
    benchmarks/run.py                      all, with their default settings
    benchmarks/run.py workload_w -- --rounds 1

Each is a script in this folder that prints a table and writes `results/<name>.json`.
"""

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, Path]:
    """Name -> script. Files that cannot be run hold what scripts share."""
    scripts = (p for p in sorted(HERE.glob("*.py")) if p.stem not in ("run", "report"))
    return {p.stem: p for p in scripts if '__name__ == "__main__"' in p.read_text()}


def headline(script: Path) -> str:
    """First line of a script's docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def main() -> int:
    own, passed_on = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument("--list", action="store_true", help="only name them")
    args = parser.parse_args(own)
    known = benchmarks()
    unknown = [n for n in args.names if n not in known]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    if args.list:
        for name, script in known.items():
            print(f"{name:24} {headline(script)}")
        return 0
    failed = []
    for name in args.names or known:
        print(f"\n## {name}: {headline(known[name])}\n", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, str(known[name]), *passed_on], check=False).returncode:
            failed.append(name)
        print(f"\n({time.monotonic() - began:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments before and after `--`."""
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
