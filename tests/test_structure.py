"""The house: what may import what, and that every module says what it is. Read from the source, nothing is run."""

import ast
import sys
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "minidistill"
FILES = sorted(PACKAGE.rglob("*.py"))
SIX = {"torch", "safetensors", "tokenizers", "numpy", "PIL", "huggingface_hub"}

# Floor by floor: a room may import itself and every room on the floors below it, never one beside or above it.
FLOORS = (
    ("errors", "models", "diffusion"),
    ("weights", "miniature"),
    ("interop",),
    ("pipeline",),
    ("data", "metrics"),
    ("training",),
    ("distill",),
    ("report",),
    ("commands",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


@cache
def nodes(path: Path) -> list[ast.AST]:
    """The module and all that is in it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def every(path: Path, kind: type[ast.AST]) -> list:
    """All nodes of a kind in a file."""
    return [node for node in nodes(path) if isinstance(node, kind)]


@cache
def imports(path: Path) -> set[str]:
    """Full names of all modules a file imports, wherever in the file, but for those that only its types need."""
    found = set()
    for_types = [node for node in every(path, ast.If) if ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for block in for_types for node in block.body for inner in ast.walk(node)}
    for node in nodes(path):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """The room of a module, such as minidistill.data.cache; the commands at the top share one."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in FLOOR else "commands"


def test_only_the_standard_library_and_the_six_packages_are_imported():
    allowed = set(sys.stdlib_module_names) | SIX | {"minidistill"}
    for path in FILES:
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def test_imports_point_one_way():
    for path in FILES:
        here = room(".".join(["minidistill", *path.relative_to(PACKAGE).with_suffix("").parts]))
        for name in imports(path):
            if name.startswith("minidistill.") and path != PACKAGE / "__init__.py":  # which opens them all
                there = room(name)
                assert there == here or FLOOR[there] < FLOOR[here], f"{path.name} imports {name}"


def test_a_model_file_can_be_copied_out():
    """It imports the shared layers and its own config at most, both in models/ too."""
    for path in (PACKAGE / "models").glob("*.py"):
        allowed = ("minidistill.models.layers.", f"minidistill.models.{path.stem}_config.")
        ours = {name for name in imports(path) if name.startswith("minidistill")}
        assert all(name.startswith(allowed) for name in ours), f"{path.name} imports {ours}"


def test_every_module_says_what_it_is_and_is_read_in_one_sitting():
    for path in FILES:
        assert ast.get_docstring(nodes(path)[0]), f"{path.name} has no docstring"
        assert path.read_text(encoding="utf-8").count("\n") <= 400, f"{path.name} has more than 400 lines"
        for node in every(path, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} has more than 60 lines"


def test_public_functions_say_their_types():
    for path in FILES:
        for node in every(path, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if not node.name.startswith("_"):
                missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                assert not missing, f"{path.name}: {node.name} says no type of {missing}"
                assert node.returns, f"{path.name}: {node.name} does not say what it returns"


def test_nothing_is_silenced_and_no_pickle_runs_code():
    for path in FILES:
        for node in every(path, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
        for node in every(path, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            called = getattr(node.func, "attr", "")
            assert keywords.get("strict") is not False or called != "load_state_dict", f"{path.name}:{node.lineno}"
            if called == "load" and ast.unparse(node.func) == "torch.load":
                assert keywords.get("weights_only") is True, f"{path.name}:{node.lineno}: torch.load may run code"
