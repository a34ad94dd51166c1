"""The study: which runs are done, which are taken from their folders, and the numbers of the table, on made-up runs."""

import json

import pytest
from tiny import save_tiny_sd1

from minidistill import study, train_kd
from minidistill.cli import run_command
from minidistill.errors import NonFiniteLoss
from minidistill.pipeline import load_pipeline
from minidistill.weights import folders


@pytest.fixture
def runs(monkeypatch):
    """Training and evaluation replaced by results that depend on the settings; all settings that were trained with."""
    seen = []

    def train(settings):
        seen.append(settings)
        folder = study.Path(settings.out)
        (folder / "student").mkdir(parents=True)
        results = {"teacher": {"parameters": 100, "macs": 80}, "student after": {"parameters": 40, "macs": 60}}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "config.json").write_text(json.dumps(train_kd.dataclasses.asdict(settings)))
        (folder / "student/model_index.json").write_text("{}")

    def measured(source, file, config, probes):
        if source == "miniature":
            return {"judge": {"all": 0.8}, "distance_to_teacher": 0.0}
        right = 0.5 + 0.1 * ("seed1" in source) - 0.3 * ("random" in source)
        return {"judge": {"all": right}, "distance_to_teacher": 0.1 + ("seed1" in source)}

    monkeypatch.setattr(train_kd, "main", train)
    monkeypatch.setattr(study, "measured", measured)
    for unused in ("load_pipeline", "Batches"):  # nothing is measured, so no probes need be drawn
        monkeypatch.setattr(study, unused, lambda *_, **__: None)
    monkeypatch.setattr(study, "make_probes", lambda *_: [None])
    monkeypatch.setattr(study, "time_students", lambda sources, *_: {**dict.fromkeys(sources, 7.5), "teacher": 10.0})
    return seen


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as info:
        run_command(study.main, study.Config, prog="study", argv=list(map(str, words)))
    return info.value.code


def test_every_row_is_a_run_and_every_run_has_settings_of_train_kd():
    assert {name for table in study.STUDIES.values() for name in table.rows} == set(study.RUNS)
    for settings in study.RUNS.values():
        train_kd.Config(**settings)
    assert study.RUNS["bk-tiny"] == {} and train_kd.Config().recipe == "bk-tiny"
    assert "bk-tiny" in study.STUDIES["ablation"].rows
    best = {name: value for name, value in train_kd.PRESETS["best"].items() if name != "comment"}
    assert best == {"steps": study.STUDIES["students"].steps, "sample_every": 500, "checkpoint_every": 500}


def test_means_and_spreads_over_seeds(runs, tmp_path, capsys):
    assert command("--only", "ablation", "--seeds", 2, "--out", tmp_path) == 0
    text = (tmp_path / "study.md").read_text()
    assert text.strip() in capsys.readouterr().out
    plain = next(line for line in text.splitlines() if line.startswith("| bk-tiny"))
    assert "-60 %" in plain and "| -25 % | -25 % |" in plain
    assert "55.0% (50.0% to 60.0%)" in plain and "69% (62% to 75%)" in plain and "0.6000 (0.1000 to 1.1000)" in plain
    assert "25.0% (20.0% to 30.0%)" in next(line for line in text.splitlines() if line.startswith("| random-all"))
    assert text.splitlines()[-1].startswith("| teacher |") and "80.0%" in text.splitlines()[-1]
    assert [s.seed for s in runs] == [0] * 5 + [1] * 5


def test_finished_runs_are_not_done_again_and_tables_share_the_runs_that_are_the_same(runs, tmp_path):
    assert command("--only", "students", "--seeds", 1, "--out", tmp_path) == 0
    assert len(runs) == 3
    assert command("--only", "students", "--seeds", 2, "--out", tmp_path) == 0
    assert [(s.recipe, s.seed) for s in runs[3:]] == [(r, 1) for r in study.STUDIES["students"].rows]
    assert command("--seeds", 1, "--out", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob("bk-tiny*seed0")) == [f"bk-tiny-{n}-seed0" for n in (1000, 2000, 320)]
    assert len(runs) == 6 + 5 + 5
    assert "students: 2000 steps per run, 1 seeds" in (tmp_path / "study.md").read_text()


def test_runs_of_other_settings_are_refused(runs, tmp_path, capsys):
    words = ("--only", "students", "--seeds", 1, "--steps", 10, "--out", tmp_path, "--precision")
    assert command(*words, "fp32") == 0
    assert command(*words, "bf16") == 2
    assert 'bk-base-10-seed0 under other settings: precision "bf16" (was "fp32")' in capsys.readouterr().err


def test_a_run_that_diverged_is_left_out_and_not_tried_again(runs, tmp_path, monkeypatch, capsys):
    def train(settings):
        if settings.recipe == "bk-base" or (settings.recipe, settings.seed) == ("bk-small", 0):
            runs.append(settings)
            study.Path(settings.out).mkdir()
            (study.Path(settings.out) / "config.json").write_text(json.dumps(train_kd.dataclasses.asdict(settings)))
            raise NonFiniteLoss("the loss is nan at step 7")
        usual(settings)

    usual = train_kd.main
    monkeypatch.setattr(train_kd, "main", train)
    words = ("--only", "students", "--seeds", 2, "--out", tmp_path, "--precision", "bf16")
    for _ in range(2):
        assert command(*words) == 0
        printed = capsys.readouterr().out
        assert "bk-small-2000-seed0 is left out: the loss is nan at step 7" in printed
        assert "| bk-small (1 of 2 diverged) | -60 % |" in printed and "| 60.0% |" in printed
        assert "| bk-base (2 of 2 diverged) |  |" in printed and "| bk-tiny | -60 % |" in printed
    assert len(runs) == 6
    assert command(*words, "--precision", "fp32") == 2  # nor counted where other settings are asked for


def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert command("--device", "cuda:99", "--out", tmp_path / "out") == 2
    assert "--device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_real_study_of_one_step(tmp_path, monkeypatch):
    save_tiny_sd1(tmp_path / "tiny", side=64)  # which takes a tenth of the miniature's time
    monkeypatch.setitem(folders.SHIPPED, "miniature", tmp_path / "tiny")
    monkeypatch.setattr(study, "RUNS", {"bk-tiny": {"recipe": "bk-tiny", "images": 32, "batch_size": 4}})
    monkeypatch.setattr(study, "STUDIES", {"students": study.Study(("bk-tiny",), 1)})
    monkeypatch.setattr(study, "PROBES", 32)
    for module in ("study", "report", "pipeline"):  # wherever sampling steps are read from
        monkeypatch.setattr(f"minidistill.{module}.STEPS", 2, raising=False)
    monkeypatch.setattr(study, "ROUNDS", 5)
    assert command("--seeds", 1, "--judged", 1, "--out", tmp_path) == 0
    files = [tmp_path / "teacher.json", tmp_path / "bk-tiny-1-seed0/measured.json"]
    before = [file.stat().st_mtime_ns for file in files]
    times = json.loads((tmp_path / "study.json").read_text())["ms_per_call"]
    assert 0 < times["bk-tiny"] < times["teacher"]
    monkeypatch.setattr(study, "time_students", lambda sources, *_: dict.fromkeys(sources, 1.0))  # once is enough
    assert command("--seeds", 1, "--judged", 1, "--out", tmp_path) == 0
    assert [file.stat().st_mtime_ns for file in files] == before, "no model is evaluated twice"
    assert command("--seeds", 1, "--judged", 2, "--out", tmp_path) == 0
    assert [json.loads(file.read_text())["captions"] for file in files] == [2, 2]
    assert load_pipeline(tmp_path / "bk-tiny-1-seed0/student").unet.config.mid_block_type is None
    teacher, student = (json.loads(file.read_text())["distance_to_teacher"] for file in files)
    assert teacher == 0 < student
