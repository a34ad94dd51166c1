"""Protects the command line: where values come from, one clear line for what is refused, help, exit codes."""

import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_files import fill

from minidistill.__main__ import commands, main
from minidistill.cli import ELSEWHERE, GROUPS, REQUIRED, option, parse, run_command
from minidistill.errors import InputError, NonFiniteLoss, Stopped, Terminated
from minidistill.training.run_folder import RunFolder


@dataclass(frozen=True)
class Config:
    steps: int = option(300, "optimizer steps", minimum=1, maximum=1_000_000)
    learning_rate: float = option(1e-4, "AdamW learning rate; 100% of it after the warm-up")
    recipe: str = option("bk-small", "pruning recipe", choices=("bk-base", "bk-small", "bk-tiny"))
    stages: tuple[int, ...] = option((32, 8, 4), "step counts of the stages")
    lora: tuple[str, ...] | None = option(None, "LoRA files")
    lora_rank: int | None = option(None, "rank of the LoRA (default: all weights are trained)")
    flip: bool = option(True, "random horizontal flip")
    resume: bool = option(False, "resume the run in --out")
    out: str = option("runs/toy", "folder of the run")


PRESETS = {
    "toy": {"comment": "20 steps, 5 s on 1 CPU core, 50% of nothing", "steps": 20, "flip": False},
    "long": {"comment": "long " * 12, "learning_rate": 1e-4, "recipe": "bk-small"},
}
PROG = "python -m minidistill.toy"


def parsed(*words, config_class=Config, presets=PRESETS):
    return parse(config_class, presets, words, PROG, "A toy command.")


def refusal(*words, **options):
    with pytest.raises(InputError) as error:
        parsed(*words, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_field_type_is_read():
    words = "--steps 7 --learning-rate 3e-5 --recipe bk-tiny --stages 8,4,1 --lora-rank 16 --no-flip --resume"
    config = parsed(*words.split())
    expected = {"steps": 7, "learning_rate": 3e-5, "recipe": "bk-tiny", "stages": (8, 4, 1), "lora_rank": 16}
    assert config == Config(**expected, flip=False, resume=True)
    assert isinstance(config.learning_rate, float) and isinstance(config.stages[0], int)
    assert parsed("--lora-rank", "none").lora_rank is None
    assert parsed("--steps=9").steps == 9
    assert parsed() == Config()


def test_of_a_flag_given_twice_the_last_counts_but_lora_files_gather():
    assert parsed("--stages", "8,4", "--stages", "1").stages == (1,)
    assert parsed("--steps", "7", "--steps", "9").steps == 9
    assert parsed("--lora", "a,b", "--lora", "c").lora == ("a", "b", "c")
    assert not parsed("--lora", "none").lora


def test_a_preset_gives_values_and_flags_win_in_any_order():
    assert parsed("--preset", "toy") == Config(steps=20, flip=False)
    assert parsed("--preset", "toy", "--steps", "5", "--flip") == Config(steps=5, flip=True)
    assert parsed("--steps", "300", "--preset", "toy") == Config(flip=False)  # also one that repeats the default


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lerning-rate 1", "unknown flag --lerning-rate (did you mean --learning-rate?)"),
        ("--step 5", "unknown flag --step (did you mean --steps?)"),  # no abbreviations
        ("word", "unexpected word 'word'"),
        ("--steps many", "--steps takes a whole number, not 'many'"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--steps 1000001", "--steps must be at most 1000000, not 1000001"),
        (f"--lora-rank {2**63}", f"--lora-rank must be at most {2**63 - 1}, not {2**63}"),
        (f"--lora-rank -1{'0' * 400}", f"--lora-rank must be at least -{2**63 - 1}"),
        ("--steps", "--steps: expected one argument"),
        ("--out=", "--out is empty; if it was given a variable of the shell"),
        ("--learning-rate nan", "--learning-rate takes a finite number, not 'nan'"),
        ("--recipe bk-smal", "not 'bk-smal' (did you mean bk-small?)"),
        ("--stages 8,x", "--stages takes a whole number, not 'x'"),
        ("--stages ,", "--stages is empty"),
        ("--lora=", "--lora is empty"),
        ("--preset tiny", "--preset takes toy, long, not 'tiny'"),
        ("--learning_rate 1", "--learning_rate is --learning-rate here"),
        ("--max_train_steps 5", "--max_train_steps is --steps here"),
        ("--resume_from_checkpoint latest", "--resume_from_checkpoint is --resume here"),
        ("--output-dir x", "--output-dir is --out here"),
        ("--hub_model_id x", "unknown flag --hub_model_id;"),  # which is no flag of this command
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_it(words, expected):
    assert expected in refusal(*words.split())


def test_home_is_expanded_in_paths_and_not_in_prompts(monkeypatch):
    @dataclass(frozen=True)
    class Generate(Config):
        prompt: str = option("", "what the image shows")

    monkeypatch.setenv("HOME", "/home/me")
    config = parsed("--out=~/runs", "--lora=~/a,b", "--prompt=~/x", config_class=Generate, presets=None)
    assert (config.out, config.lora, config.prompt) == ("/home/me/runs", ("/home/me/a", "b"), "~/x")


def test_a_required_setting_and_positional_words():
    @dataclass(frozen=True)
    class Convert:
        source: str = option(REQUIRED, "what to read", positional=True)
        dest: str = option("converted", "what to write", positional=True)
        prompt: str = option(REQUIRED, "the text")

    config = parsed("here", "--prompt", "a red circle", config_class=Convert, presets=None)
    assert config == Convert(source="here", dest="converted", prompt="a red circle")
    assert "--prompt is required: the text" in refusal("here", "there", config_class=Convert, presets=None)
    assert "did you mean --prompt?" in refusal("here", "--promt", "x", config_class=Convert, presets=None)
    assert "SOURCE" in refusal("--prompt", "x", config_class=Convert, presets=None)
    usage = help_of(lambda: parsed("--help", config_class=Convert, presets=None))
    assert usage.startswith(f"usage: {PROG} SOURCE DEST [FLAGS]")
    assert parsed("here", "--prompt", "", config_class=Convert, presets=None).prompt == ""


def help_of(call):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exit_info:
        call()
    assert exit_info.value.code == 0
    return " ".join(out.getvalue().split())


def test_help_shows_sections_defaults_choices_and_presets_with_their_comments():
    text = help_of(lambda: parsed("--help"))
    for expected in (
        "A toy command.",
        "data: --flip, --no-flip random horizontal flip (default: on) optimisation: --learning-rate X AdamW",
        "100% of it after the warm-up (default: 0.0001) run: --steps N optimizer steps (default: 300)",
        "--recipe bk-base|bk-small|bk-tiny",
        "(default: 32,8,4)",
        "rank of the LoRA (default: all weights are trained) data:",
        "toy: 20 steps, 5 s on 1 CPU core, 50% of nothing. steps 20, flip off",
        "learning-rate 0.0001, recipe bk-small",  # by their flags, and no word is torn
    ):
        assert expected in text
    assert "SUPPRESS" not in text and text.count("(default: ") == len(dataclasses.fields(Config))


def config_of(name: str):
    """(module, Config) of a command."""
    module = importlib.import_module(f"minidistill.{name}")
    found = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__]
    return module, found[0]


@pytest.mark.parametrize("name", commands())
def test_the_help_of_every_command_is_plain(name):
    module, config = config_of(name)
    text = help_of(lambda: parse(config, getattr(module, "PRESETS", None), ["--help"], PROG, module.__doc__))
    assert not re.search("none (takes|leaves|keeps|goes|trains)|nobody|averages nothing", text)


def test_sections_and_other_tools_names_are_of_flags_that_there_are():
    names = {field.name for name in commands() for field in dataclasses.fields(config_of(name)[1])}
    assert {name for group in GROUPS.values() for name in group.split()} <= names
    assert set(ELSEWHERE) <= names


def test_every_command_is_listed_without_loading_torch():
    code = "import sys, runpy; sys.argv[1:] = [{!r}]; runpy.run_module('minidistill', run_name='__main__')"
    check = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); "
    for word, status, said in (("--help", 0, "train_kd "), ("train", 2, "no command train; there are benchmark,")):
        words = [sys.executable, "-c", check + code.format(word)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.split()[-1]) == (status, "False"), done.stderr
        assert said in done.stdout + done.stderr
    assert {"train_kd", "finetune", "generate", "convert", "cache"} <= set(commands())
    assert all(commands().values())


@pytest.mark.parametrize("words", [("-m", "minidistill.train_kd"), ("-m", "minidistill", "train_kd"), ("-c", "{}")])
def test_an_interrupt_while_torch_is_imported_ends_in_one_line(tmp_path, words):
    script = "import sys, minidistill.__main__ as m; sys.argv = ['minidistill', 'train_kd']; m.main()"  # as installed
    fill(tmp_path, {"torch/__init__.py": "raise KeyboardInterrupt"})
    call = [sys.executable, *(word.format(script) for word in words)]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    said = "\ninterrupted before anything was done: run the same command again\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_command_is_run_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minidistill", "train-kd", "--stepz"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2 and "did you mean --steps?" in capsys.readouterr().err


def test_settings_a_run_folder_and_a_resume_fit_together(tmp_path, capsys):
    def open_as_told(*words):
        config = parsed("--out", str(tmp_path / "run"), *words)
        settings = dataclasses.asdict(config)
        RunFolder.find(config.out, settings, resume=config.resume).begin(settings)
        return config

    first = open_as_told("--preset", "toy", "--learning-rate", "0.01", "--lora-rank", "4", "--stages", "2,1")
    assert open_as_told("--resume") == dataclasses.replace(first, resume=True)
    assert parsed("--out", str(tmp_path / "run")).learning_rate == 1e-4  # a new run does not take what is stored
    assert open_as_told("--resume", "--steps", "40", "--learning-rate", "0.01").steps == 40
    assert "steps 40 (was 20)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"learning_rate 0.02 \(was 0.01\)"):
        open_as_told("--resume", "--learning-rate", "0.02")
    with pytest.raises(InputError, match="in use"):
        open_as_told()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"steps": 2.5}, "steps takes a whole number, not '2.5'"),
        ({"recipe": "bk-smal"}, "did you mean bk-small?"),
        ({"stages": [2, "x"]}, "stages takes a whole number, not 'x'"),
        ({"learning_rate": None}, "learning_rate takes a finite number, not 'none'"),
        ({"flip": "no"}, "flip must be true or false, not 'no'"),
        ({"steps": []}, "steps"),
    ],
)
def test_an_edited_setting_of_a_run_is_checked_like_a_flag(tmp_path, setting, expected):
    fill(tmp_path, {"config.json": setting})
    told = refusal("--out", str(tmp_path), "--resume")
    assert f"{tmp_path}/config.json: " in told and expected in told


def outcome(error, *words, capsys):
    """Exit code and stderr of a command that ends with this error, or none."""

    def command(config):
        if error:
            raise error

    with pytest.raises(SystemExit) as exit_info:
        run_command(command, Config, PRESETS, prog=PROG, argv=words)
    return exit_info.value.code, capsys.readouterr().err


def test_a_name_that_the_terminal_cannot_spell_is_printed_all_the_same(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    with pytest.raises(SystemExit) as exit_info:
        run_command(lambda config: print(config.out), Config, prog=PROG, argv=["--out", "图"])
    sys.stdout.flush()
    assert exit_info.value.code == 0 and sys.stdout.buffer.getvalue().strip() == b"\\u56fe"


def test_exit_codes(capsys, tmp_path):
    assert outcome(None, capsys=capsys) == (0, "")
    assert outcome(InputError("no such teacher"), capsys=capsys) == (2, "error: no such teacher\n")
    assert outcome(NonFiniteLoss("nan"), capsys=capsys) == (3, "error: nan\n")
    denied = PermissionError(13, "Permission denied", "/shared/model/unet")
    assert outcome(denied, capsys=capsys) == (2, "error: /shared/model/unet: Permission denied\n")
    code, err = outcome(None, "--stepz", "3", capsys=capsys)
    assert (code, err.count("\n"), err.startswith("error: unknown flag --stepz")) == (2, 1, True)
    out = str(tmp_path / "a run")
    code, err = outcome(KeyboardInterrupt(), "--out", out, capsys=capsys)
    assert code == 130 and "to start again if nothing was kept: run the same command again" in err
    fill(tmp_path, {"a run/config.json": {}})
    code, err = outcome(KeyboardInterrupt(), "--out", out, capsys=capsys)
    assert code == 130 and f"{PROG} --out '{out}' --resume" in err
    code, err = outcome(Terminated(), "--out", out, capsys=capsys)
    assert code == 143 and err.startswith("\nterminated. To resume") and err.count("\n") == 2
    again = f" To resume from the last checkpoint: {PROG} --out '{out}' --resume\n"
    assert outcome(Stopped("no room"), "--out", out, capsys=capsys) == (2, f"error: no room.{again}")
    full = OSError(errno.ENOSPC, "No space left on device")  # of what is printed into a file
    said = f"error: cannot print: No space left on device; make room.{again}"
    assert outcome(full, "--out", out, capsys=capsys) == (2, said)
    for bug in (RuntimeError("bug"), OSError("bug")):  # which keep their traceback
        with pytest.raises(type(bug), match="bug"):
            outcome(bug, capsys=capsys)
