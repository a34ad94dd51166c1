"""The notebooks: one fast run of each, with right and wrong solutions of every exercise; and their stored outputs.

`python tests/test_notebooks.py` runs every notebook in full and stores its outputs.
"""

import base64
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SIZE = 1_500_000  # bytes, with its images
MACHINE = re.compile(
    r"(?<![\w.:/])(/(home|root|usr|tmp|opt|work|mnt|Users|private|var)/|[A-Z]:\\)|ipykernel_\d|0x[0-9a-f]{9,}"
)

# {exercise: (right solution, [(text in it, replaced by, what the check says of that), ...])}
SOLUTIONS = {
    "outer_levels": (
        'def outer_levels():\n    return ("down.0.1", "down.1.1", "up.3.1", "up.2.1", "mid")',
        [
            ('"up.3.1", "up.2.1"', '"up.0.1", "up.1.1"', "does not fit together"),
            (', "mid"', "", "the mid block is not removed"),
            ('"down.0.1", "down.1.1", "up.3.1", "up.2.1"', '*RECIPES["bk-base"].remove', "the down stages keep"),
            ("return", "remove =", "a tuple of names"),
        ],
    ),
    "conv_costs": (
        """
def conv_costs(kernel, c_in, c_out, h, w):
    weights = kernel**2 * c_in * c_out
    return weights + c_out, weights * h * w
""",
        [
            ("weights + c_out,", "weights,", "bias included"),
            ("weights * h * w", "(weights + c_out) * h * w", "MACs in one call"),
        ],
    ),
    "teacher_name": (
        """
def teacher_name(name, removal):
    part, *rest = name.split(".")
    if part in ("down_blocks", "up_blocks"):
        stage = int(rest[0])
        layers = (removal.kept_down if part == "down_blocks" else removal.kept_up)[stage]
        if part == "up_blocks":
            rest[0] = str(stage + removal.stages_removed)
        if rest[1] in ("resnets", "attentions"):
            rest[2] = str(layers[int(rest[2])])
    return ".".join([part, *rest])
""",
        [
            ("str(layers[int(rest[2])])", "rest[2]", "is initialised by"),
            ("stage + removal.stages_removed", "stage", "bk-tiny: up_blocks.0"),
        ],
    ),
    "greedy": (
        """
def greedy(scores, saving):
    taken = []
    while sum(s.parameters for s in taken) < saving:
        free = [s for s in scores if not any(s.weights & old.weights for old in taken)]
        taken.append(min(free, key=lambda s: s.sensitivity / s.parameters))
    return taken
""",
        [
            ("s.sensitivity / s.parameters", "s.sensitivity", "the least sensitivity per parameter"),
            ("not any(s.weights & old.weights for old in taken)", "s not in taken", "shares the weight"),
            ("< saving", "<= saving", "that is enough"),
            ("return taken", "return None", "returns nothing"),
        ],
    ),
    "my_output_loss": (
        """
def my_output_loss(student_out, teacher_out):
    return (student_out.float() - teacher_out.detach().float()).square().flatten(1).mean(1)
""",
        [
            (".flatten(1).mean(1)", ".mean()", "one number for each"),
            (".detach()", "", "reaches the teacher"),
            (".float()", "", "in float16"),
            (".square()", ".abs()", "should be"),
            (".square()", ".detach().square()", "no gradient reaches the student"),
        ],
    ),
    "normalised_term": (
        """
def normalised_term(f_student, f_teacher):
    size = f_teacher.float().square().flatten(1).mean(1)
    error = (f_student.float() - f_teacher.float()).square().flatten(1).mean(1)
    return error / size
""",
        [
            ("error / size", "error / size.mean()", "a feature of zeros has the term"),
            ("error / size", "(error / size).sqrt()", "three times the teacher's feature has the term"),
            ("error / size", "(error / size).mean()", "one number for each"),
        ],
    ),
    "reached": (
        """
def reached(feature):
    side, stage = feature.split(".")[:2]
    down, up = (3, int(stage) + 1) if side == "up" else (int(stage) + 1, 0)
    parts = {"conv_in", "time_embedding"} | {f"down_blocks.{i}" for i in range(down)}
    return parts | {f"up_blocks.{i}" for i in range(up)}
""",
        [
            ('{"conv_in", "time_embedding"} | ', "", "also reaches"),
            ("return parts", "return set(PARTS)", "down.0 does not reach"),
        ],
    ),
    "eps_loss_of_v": (
        """
def eps_loss_of_v(v_student, v_teacher, t, alpha_bar):
    return alpha_bar[t] * kd.mean_square(v_student, v_teacher)
""",
        [
            ("alpha_bar[t] * ", "", "times the expected loss"),
            ("alpha_bar[t]", "(1 - alpha_bar[t])", "times the expected loss"),
        ],
    ),
}


def run_notebook(notebook, fast: bool) -> None:
    """Execute all cells in place, with this checkout's package whether it is installed or not."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    env.pop("MINIDISTILL_FAST", None)
    if fast:
        env["MINIDISTILL_FAST"] = "1"
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=resources, timeout=3600, startup_timeout=600, record_timing=False
    )
    client.execute(env=env)


def store(path: Path, fast: bool = False) -> None:
    """Run a notebook and write it back with its outputs: no times, no warnings, nothing of this machine."""
    notebook = nbformat.read(path, as_version=4)
    run_notebook(notebook, fast)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for text in filter(lambda o: o.output_type == "stream", cell.outputs):
                text.text = text.text.replace(str(ROOT), ".")
    nbformat.write(notebook, path)


def text_of(output) -> str:
    """What can be read in an output."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join((output.ename, output.evalue, *output.traceback))
    return "\n".join(value for kind, value in output.data.items() if kind.startswith("text/"))


def named(notebook, tag: str) -> dict:
    """{exercise: its cell with this tag}"""
    return {cell.metadata["name"]: cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())}


def with_solutions(notebook) -> list[tuple[str, str, nbformat.NotebookNode]]:
    """After each check insert all solutions with the check again, then the stub, so that the rest runs as for a reader.

    Returns (exercise, what the check is to say, the cell that checks) for each.
    """
    stubs, cells, expected = named(notebook, "exercise"), [], []
    for cell in notebook.cells:
        cells.append(cell)
        if "check" not in cell.metadata.get("tags", ()):
            continue
        name = cell.metadata["name"]
        right, wrong = SOLUTIONS[name]
        assert all(old in right for old, _, _ in wrong)
        attempts = [(right, "correct"), *((right.replace(old, new), says) for old, new, says in wrong)]
        expected.append((name, "not solved yet", cell))
        for solution, says in [*attempts, (stubs[name].source, "not solved yet")]:
            check = nbformat.v4.new_code_cell(cell.source, metadata={"tags": ["raises-exception"]})
            cells += [nbformat.v4.new_code_cell(solution), check]
            expected.append((name, says, check))
    notebook.cells = cells
    return expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom_and_checks_tell_right_solutions_from_wrong_ones(path):
    notebook = nbformat.read(path, as_version=4)
    expected = with_solutions(notebook)
    run_notebook(notebook, fast=True)
    for name, says, cell in expected:
        said = "\n".join(map(text_of, cell.outputs))
        if says in ("correct", "not solved yet"):
            assert said.strip() == says, f"{name}: {said}"
        else:
            assert [o.ename for o in cell.outputs if o.output_type == "error"] == ["AssertionError"], f"{name}: {said}"
            assert says in said, f"{name}: {said}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_has_three_exercises_or_more_each_with_a_check_and_solutions(path):
    notebook = nbformat.read(path, as_version=4)
    exercises, checks = named(notebook, "exercise"), named(notebook, "check")
    assert len(exercises) >= 3
    assert list(exercises) == list(checks)
    for name, cell in exercises.items():
        assert 'raise NotImplementedError("your turn")' in cell.source
        assert f"def {name}(" in cell.source
        right, wrong = SOLUTIONS[name]
        assert wrong, f"{name} has no wrong solutions"
        assert right.strip() not in "".join(cell.source for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert path.stat().st_size <= SIZE
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in order, all of it"
    images = 0
    for cell in code:
        assert "execution" not in cell.metadata
        if "check" in cell.metadata.get("tags", ()) or re.search(r"(?m)^(print|show|plt\.show)\(", cell.source):
            assert cell.outputs, cell.source
        for output in cell.outputs:
            assert output.output_type != "error", text_of(output)
            assert output.get("name") != "stderr", text_of(output)
            assert not MACHINE.search(text_of(output)), text_of(output)
            images += "image/png" in output.get("data", {})
            for kind, value in output.get("data", {}).items():
                assert kind != "image/png" or base64.b64decode(value).startswith(b"\x89PNG")
    assert images >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_that_is_shown_is_the_package_s_as_it_is_now(path):
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "minidistill").rglob("*.py")]
    shown = 0
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for code in re.findall(r"```python\n(.*?)```", output.get("data", {}).get("text/markdown", ""), re.DOTALL):
                shown += 1
                stale = f"{code.splitlines()[0]} ... has changed: python tests/test_notebooks.py"
                assert any(code in source for source in sources), stale
    assert shown >= 3


if __name__ == "__main__":
    for notebook_file in NOTEBOOKS:
        store(notebook_file)
        print(notebook_file.relative_to(ROOT), flush=True)
