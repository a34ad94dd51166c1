"""The list of commands: python -m minidistill, or minidistill once it is installed.

A command is a module of this package that runs as a script: `minidistill train_kd --help` is
`python -m minidistill.train_kd --help`. Its line in the list is the first of its docstring, read without importing it.
"""

import ast
import runpy
import sys
from pathlib import Path

from minidistill.errors import DONE, REFUSED, exit_if_interrupted


def commands() -> dict[str, str]:
    """Name -> first line of the docstring, of every module with an `if __name__ == "__main__":` of its own."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        source = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> None:
    """Run the command named first, or list them all; exits with 0, 2 or the command's own code."""
    name, *rest = sys.argv[1:] or ["--help"]
    known = commands()
    if name in ("-h", "--help"):
        print("usage: minidistill COMMAND [FLAGS]   (each has --help)\n")
        print("\n".join(f"  {name:17}{line}" for name, line in known.items()))
        sys.exit(DONE)
    if (module := name.replace("-", "_")) not in known:
        print(f"error: no command {name}; there are {', '.join(known)}", file=sys.stderr)
        sys.exit(REFUSED)
    sys.argv[:] = [name, *rest]
    sys.excepthook = exit_if_interrupted
    runpy.run_module(f"minidistill.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
