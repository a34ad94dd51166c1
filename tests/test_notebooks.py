"""The notebooks: one fast run of each, with right and wrong solutions of every exercise; and their stored outputs.

`python tests/test_notebooks.py` runs every notebook in full and stores its outputs. `python tests/test_notebooks.py
curves` makes the stored curves of notebook 02; it takes less than an hour on one core, and resumes.
"""

import base64
import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import solutions  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CURVES = ROOT / "notebooks" / "curves_1000_steps.json"
TEACHER = ROOT / "minidistill" / "miniature" / "unet" / "diffusion_pytorch_model.safetensors"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SIZE = 1_500_000  # bytes, with its images
MACHINE = re.compile(
    r"(?<![\w.:/])(/(home|root|usr|tmp|opt|work|mnt|Users|private|var)/|[A-Z]:\\)|ipykernel_\d|0x[0-9a-f]{9,}"
)

PRINTS = re.compile(r"(?m)^(print|show|draw_images|plt\.show)\(")

# Wrong solutions, {exercise: [(text in the right one, replaced by, what the check says of that), ...]}
WRONG = {
    "x0_from_eps": [
        ("a.sqrt()", "a", "all samples at t = 500"),
        (".reshape(-1, 1, 1, 1)", "", "must be broadcast over"),
        ("return", "x0 =", "the shape of x_t"),
    ],
    "feature_shape": [
        ("last - int(stage)", "int(stage)", "up.0 of the miniature"),
        ("side >> after, side >> after", "side >> level, side >> level", "down.0 of the miniature"),
        ("min(level + 1, last)", "level + 1", "down.3 of the miniature"),
        ("channels[level]", "channels[after]", "down.0 of the miniature"),
    ],
    "guided": [
        ("[uncond, context]", "[context, uncond]", "g = 0 should be the prediction without the prompt"),
        ("u, c = unet", "unet(x, t, context)\n    u, c = unet", "one call with 4 samples"),
        (".chunk(2)", ".chunk(4)[:2]", "for each of the 2 samples"),
    ],
    "ddim_step": [
        ("(1 - a_next)", "(1 - a)", "a step to alpha_bar = 1"),
        ("(1 - a_next).sqrt() * eps", "(1 - a_next).sqrt() * torch.randn_like(eps)", "changes nothing"),
    ],
    "outer_levels": [
        ('"up.3.1", "up.2.1"', '"up.0.1", "up.1.1"', "does not fit together"),
        (', "mid"', "", "the mid block is not removed"),
        ('"down.0.1", "down.1.1", "up.3.1", "up.2.1"', '*RECIPES["bk-base"].remove', "the down stages keep"),
        ("return", "remove =", "a tuple of names"),
    ],
    "conv_costs": [
        ("weights + c_out,", "weights,", "bias included"),
        ("weights * h * w", "(weights + c_out) * h * w", "MACs in one call"),
    ],
    "teacher_name": [
        ("str(layers[int(rest[2])])", "rest[2]", "is initialised by"),
        ("stage + removal.stages_removed", "stage", "bk-tiny: up_blocks.0"),
    ],
    "greedy": [
        ("s.sensitivity / s.parameters", "s.sensitivity", "the least sensitivity per parameter"),
        ("not any(s.weights & old.weights for old in taken)", "s not in taken", "shares the weight"),
        ("< saving", "<= saving", "that is enough"),
        ("return taken", "return None", "returns nothing"),
    ],
    "my_output_loss": [
        (".flatten(1).mean(1)", ".mean()", "one number for each"),
        (".detach()", "", "reaches the teacher"),
        (".float()", "", "in float16"),
        (".square()", ".abs()", "should be"),
        (".square()", ".detach().square()", "no gradient reaches the student"),
    ],
    "normalised_term": [
        ("error / size", "error / size.mean()", "a feature of zeros has the term"),
        ("error / size", "(error / size).sqrt()", "three times the teacher's feature has the term"),
        ("error / size", "(error / size).mean()", "one number for each"),
    ],
    "reached": [
        ('{"conv_in", "time_embedding"} | ', "", "also reaches"),
        ("return parts", "return set(PARTS)", "down.0 does not reach"),
    ],
    "eps_loss_of_v": [
        ("alpha_bar[t] * ", "", "times the expected loss"),
        ("alpha_bar[t]", "(1 - alpha_bar[t])", "times the expected loss"),
    ],
    "mixture_eps": [
        ("weights * away", "away", "near the modes"),
        ("(2 * variance)", "variance", "near the modes"),
        (" / variance).sum(1)", ").sum(1)", "with a single mode"),
    ],
    "my_jump_table": [
        ("teacher // student + 1,", "teacher // student,", "a table of"),
        ("[-1]", "[0]", "the row of t = 999 is"),
        ("trailing", "leading", "the row of t = 999 is"),
        ("return grid", "return grid.float()", "timesteps are int64"),
    ],
    "jump_loss": [
        ("times[:, -1]", "times[:, 1]", "ends at the last timestep"),
        ("model(x_t, t)", "model(x_t, t_next.clamp(min=0))", "at the first timestep"),
        (
            "kd.mean_square(move(x_t, model(x_t, t), t, t_next, alpha_bar), target)",
            "(move(x_t, model(x_t, t), t, t_next, alpha_bar) - target).square().mean()",
            "one number for each",
        ),
        (
            "t_next = times[:, 0], times[:, -1]",
            "t_next = times[:, 0], times[:, -1]\n    model(x_t, t)",
            "called the model 2",
        ),
    ],
    "sharpness": [
        ("pixels.mean(1)", "pixels[:, 0]", "cancel in grey"),
        (".abs()", "", "a white dot on black"),
        (".flatten(1).mean(1)", ".mean()", "one number for each"),
        ("4 * centre", "3 * centre", "a plain image"),
    ],
    "player_losses": [
        (", F.softplus(-fake)", ", -fake.sigmoid().log()", "use softplus"),
        (", F.softplus(-fake)", ", -F.softplus(fake)", "L_G = ln 2"),
        ("F.softplus(-real) +", "F.softplus(real) +", "not equation (20)"),
        (", F.softplus(-fake)", ", F.softplus(fake)", "not equation (21)"),
    ],
    "best_logit": [
        ("real.log() - fake.log()", "fake.log() - real.log()", "a larger logit than"),
        ("real.log() - fake.log()", "real - fake", "has less loss"),
        ("real.log() - fake.log()", "real / fake", "tells nothing"),
    ],
    "ranking": [
        ("(real - fake).sign()", "(2.0 * (real > fake) - 1)", "1 is a tie"),
        (".item()", "", "a float is asked for"),
    ],
    "amplification": [
        ("(1 - a_next).sqrt() - ", "", "from t = 999 to 499"),
        (".abs()", "", "from t = 999 to -1"),
        ("((1 - a) / a).sqrt()", "((1 - a) / a)", "from t = 999 to -1"),
    ],
    "mean_error": [
        ("/ n)", ")", "in trials"),
        ("(1 - a) / a", "(1 - a)", "in trials"),
    ],
    "score_difference": [
        ("eps_fake - eps_real", "eps_real - eps_fake", "yours is -1 times"),
        (" / (1 - a).sqrt()", "", "times the gradient"),
        ("eps_fake - eps_real", "-eps_real", "times the gradient"),
    ],
    "solve_linear": [
        ("T, solution[-1]", "T, 0 * solution[-1]", "the bias that made"),
        ("solution[:-1].T", "solution[:-1]", "are asked for"),
        ("h, torch.ones", "2 * h, torch.ones", "the weight that made"),
    ],
    "pull": [
        ("F.softplus(-judge(latents))", "F.softplus(judge(latents))", "of -log p is asked for"),
        (".sum()", ".mean()", "of -log p is asked for"),
        ("return torch", "F.softplus(-judge(latents)).sum().backward()\n    return torch", "weights got a gradient"),
    ],
}


def store(path: Path) -> None:
    """Run a notebook and write it back with its outputs: no times, no warnings, nothing of this machine."""
    notebook = nbformat.read(path, as_version=4)
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # installed or not
    env = os.environ | {"PYTHONPATH": search, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", resources=resources, timeout=3600, startup_timeout=600, record_timing=False
    )
    client.execute(env=env | {"MINIDISTILL_FAST": ""})
    notebook.metadata = METADATA
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = output.text.replace(str(ROOT), ".")
                elif "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])
    nbformat.write(notebook, path)


def smaller(png: str) -> str:
    """A figure, in base64, with 256 colours: less than half of the size."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


def store_curves(steps: int = 1000, every: int = 50, seeds: int = 3, images: int = 4096) -> None:
    """Run the ablation of notebook 02, by its own cells, for longer, with batches of 8 (random weights: one seed)."""
    os.nice(19)
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOKS[2], as_version=4).cells}
    scope = {"__name__": "notebook"}
    exec(cells["setup"], scope)
    scope["IMAGES"] = images
    for name in ("parts", "pairs", "loop"):
        exec(cells[name], scope)
    teacher = hashlib.sha256(TEACHER.read_bytes()).hexdigest()
    stored = {"teacher": teacher, "steps": list(range(0, steps + 1, every)), "runs": {}}
    if CURVES.exists() and (found := json.loads(CURVES.read_text())) | {"runs": {}} == stored:
        stored = found
    for seed in range(seeds):
        train = scope["Batches"](scope["latents"], scope["pipe"], batch_size=8, seed=seed, caption_dropout=0.1)
        for name, settings in scope["RUNS"].items():
            curves = stored["runs"].setdefault(name, [])
            if len(curves) == seed and (seed == 0 or settings.get("copy_weights", True)):
                curves.append(scope["distil"](train, steps, every, 4e-3, **settings)[1])
                CURVES.with_suffix(".tmp").write_text(json.dumps(stored))
                CURVES.with_suffix(".tmp").replace(CURVES)
                print(f"seed {seed}, {name}: MSE to teacher {curves[-1][-1]:.4f}", flush=True)


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


def run_cell(source: str, scope: dict) -> str:
    """Run a cell in this process; what it prints, or why it was refused."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(compile(source, "<cell>", "exec"), scope)
        except AssertionError as error:
            return f"AssertionError: {error}"
    return printed.getvalue().strip()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_top_to_bottom_and_checks_tell_right_solutions_from_wrong_ones(path, monkeypatch):
    """After each check come all solutions, then the stub again, so that the rest runs as for a reader."""
    monkeypatch.setenv("MINIDISTILL_FAST", "1")
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    notebook, scope = nbformat.read(path, as_version=4), {"__name__": "notebook"}
    stubs = named(notebook, "exercise")
    with torch.enable_grad():  # and as it was, where a notebook turns gradients off
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            said = run_cell(cell.source, scope)
            assert "AssertionError" not in said, f"{cell.source}: {said}"
            if "check" not in cell.metadata.get("tags", ()):
                continue
            name = cell.metadata["name"]
            assert said == "not solved yet", f"{name}: {said}"
            right = inspect.getsource(getattr(solutions, name))
            run_cell(right, scope)
            assert run_cell(cell.source, scope) == "correct", name
            for old, new, reason in WRONG[name]:
                assert old in right, f"{name}: no {old}"
                run_cell(right.replace(old, new), scope)
                said = run_cell(cell.source, scope)
                assert said.startswith("AssertionError: ") and reason in said, f"{name}, {new}: {said}"
            run_cell(stubs[name].source, scope)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_has_three_exercises_or_more_each_with_a_check_and_solutions(path):
    notebook = nbformat.read(path, as_version=4)
    exercises, checks = named(notebook, "exercise"), named(notebook, "check")
    assert len(exercises) >= 3
    assert list(exercises) == list(checks)
    for name, cell in exercises.items():
        assert 'raise NotImplementedError("your turn")' in cell.source
        assert f"def {name}(" in cell.source
        assert WRONG[name], f"{name} has no wrong solutions"
        body = inspect.getsource(getattr(solutions, name)).split('"""')[2]
        assert body.strip() not in "".join(cell.source for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_whole_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert path.stat().st_size <= SIZE
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in order, all of it"
    images = 0
    for cell in code:
        assert "execution" not in cell.metadata
        if "check" in cell.metadata.get("tags", ()) or PRINTS.search(cell.source):
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
    files = *(ROOT / "minidistill").rglob("*.py"), ROOT / "notebooks" / "toy.py"
    sources = [file.read_text(encoding="utf-8") for file in files]
    shown = 0
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            for code in re.findall(r"```python\n(.*?)```", output.get("data", {}).get("text/markdown", ""), re.DOTALL):
                shown += 1
                stale = f"{code.splitlines()[0]} ... has changed: python tests/test_notebooks.py"
                assert any(code in source for source in sources), stale
    assert shown >= 3


def test_stored_curves_are_of_the_shipped_teacher():
    for file in CURVES.parent.glob(CURVES.name):
        stored = json.loads(file.read_text())
        assert stored["teacher"] == hashlib.sha256(TEACHER.read_bytes()).hexdigest(), "test_notebooks.py curves"
        assert {len(curve) for runs in stored["runs"].values() for curve in runs} == {len(stored["steps"])}


if __name__ == "__main__" and sys.argv[1:] == ["curves"]:
    store_curves()
elif __name__ == "__main__":
    for notebook_file in NOTEBOOKS:
        store(notebook_file)
        print(notebook_file.relative_to(ROOT), flush=True)
