"""Protects the command line: where values come from, one clear line for what is refused, exit codes."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from minidistill.cli import REQUIRED, option, parse, run_command
from minidistill.errors import InputError
from minidistill.training.run_folder import RunFolder


@dataclass(frozen=True)
class Config:
    steps: int = option(300, "optimizer steps", minimum=1, maximum=1_000_000)
    learning_rate: float = option(1e-4, "AdamW learning rate; 100% of it after the warm-up")
    recipe: str = option("bk-small", "which blocks to remove", choices=("bk-base", "bk-small", "bk-tiny"))
    stages: tuple[int, ...] = option((32, 8, 4), "step counts of the stages")
    lora_rank: int | None = option(None, "rank of the LoRA, none trains everything")
    flip: bool = option(True, "mirror half of the images")
    resume: bool = option(False, "go on with the run in --out")
    out: str = option("runs/toy", "folder of the run")


PRESETS = {
    "toy": {"comment": "20 steps, 5 s on 1 CPU core, 50% of nothing", "steps": 20, "flip": False},
    "long": {"comment": "a week", "steps": 50_000},
}
PROG = "python -m minidistill.toy"


def parsed(*words, config_class=Config, presets=PRESETS):
    return parse(config_class, presets, words, PROG, "A toy command.")


def refusal(*words, **options):
    with pytest.raises(InputError) as error:
        parsed(*words, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_flags_give_the_defaults():
    assert parsed() == Config()


def test_a_list_flag_given_again_goes_on_and_another_flag_starts_over():
    assert parsed("--stages", "8,4", "--stages", "1").stages == (8, 4, 1)
    assert parsed("--steps", "7", "--steps", "9").steps == 9


def test_every_field_type_is_read():
    config = parsed(
        *[
            "--steps",
            "7",
            "--learning-rate",
            "3e-5",
            "--recipe",
            "bk-tiny",
            "--stages",
            "8,4,1",
            "--lora-rank",
            "16",
            "--no-flip",
            "--resume",
        ]
    )
    expected = Config(
        steps=7, learning_rate=3e-5, recipe="bk-tiny", stages=(8, 4, 1), lora_rank=16, flip=False, resume=True
    )
    assert config == expected
    assert isinstance(config.learning_rate, float) and isinstance(config.stages[0], int)
    assert parsed("--lora-rank", "none").lora_rank is None
    assert parsed("--steps=9").steps == 9


def test_a_preset_gives_values_and_flags_win_in_any_order():
    assert parsed("--preset", "toy") == Config(steps=20, flip=False)
    assert parsed("--preset", "toy", "--steps", "5", "--flip") == Config(steps=5, flip=True)
    assert parsed("--steps", "5", "--preset", "toy") == Config(steps=5, flip=False)


def test_a_flag_that_repeats_the_default_still_beats_the_preset():
    assert parsed("--preset", "toy", "--steps", "300").steps == 300


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lerning-rate 1", "unknown flag --lerning-rate (did you mean --learning-rate?)"),
        ("--lerning-rate=1", "unknown flag --lerning-rate (did you mean --learning-rate?)"),
        ("--step 5", "unknown flag --step (did you mean --steps?)"),  # no abbreviations
        ("--zzz", "unknown flag --zzz; --help lists every flag"),
        ("word", "unexpected word 'word'"),
        ("--steps many", "--steps takes a whole number, not 'many'"),
        ("--steps 1.5", "--steps takes a whole number, not '1.5'"),
        ("--steps 0", "--steps must be at least 1, not 0"),
        ("--steps 1000001", "--steps must be at most 1000000, not 1000001"),
        (f"--lora-rank {2**63}", f"--lora-rank takes a whole number of at most 63 bits, not {2**63}"),
        (f"--lora-rank -1{'0' * 400}", "--lora-rank takes a whole number of at most 63 bits"),
        ("--steps", "--steps: expected one argument"),
        ("--learning-rate nan", "--learning-rate takes a finite number, not 'nan'"),
        ("--recipe bk-smal", "not 'bk-smal' (did you mean bk-small?)"),
        ("--stages 8,x", "--stages takes a whole number, not 'x'"),
        ("--preset tiny", "--preset takes toy, long, not 'tiny'"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_it(words, expected):
    assert expected in refusal(*words.split())


def test_a_required_setting_and_positional_words():
    @dataclass(frozen=True)
    class Convert:
        source: str = option(REQUIRED, "what to read", positional=True)
        dest: str = option("converted", "what to write", positional=True)
        prompt: str = option(REQUIRED, "the text")

    config = parsed("here", "--prompt", "a red circle", config_class=Convert, presets=None)
    assert config == Convert(source="here", dest="converted", prompt="a red circle")
    assert "--prompt is required: the text" in refusal("here", "there", config_class=Convert, presets=None)
    assert "SOURCE" in refusal("--prompt", "x", config_class=Convert, presets=None)


def test_a_preset_with_an_unknown_field_is_an_error_of_the_programmer():
    with pytest.raises(ValueError, match="preset toy: Config has no field"):
        parsed(presets={"toy": {"stepps": 3}})


def test_help_shows_defaults_choices_and_presets_with_their_comments(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parsed("--help")
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "A toy command." in text
    for expected in (
        "optimizer steps (default: 300)",
        "(default: 0.0001)",
        "bk-base|bk-small|bk-tiny",
        "(default: 32,8,4)",
        "--no-flip turns it off",
        "50% of nothing",
        "--steps 20 --no-flip",
        "--steps 50000",
        "SUPPRESS",
    ):
        assert (expected in " ".join(text.split())) == (expected != "SUPPRESS")


def test_resume_takes_the_settings_stored_in_the_run_folder(tmp_path):
    stored = dataclasses.asdict(Config(learning_rate=0.5, stages=(2, 1), steps=10))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = parsed("--out", str(tmp_path), "--resume", "--steps", "20")
    assert config == Config(learning_rate=0.5, stages=(2, 1), steps=20, resume=True, out=str(tmp_path))
    assert parsed("--out", str(tmp_path)).learning_rate == 1e-4  # a new run does not


def test_settings_a_run_folder_and_a_resume_fit_together(tmp_path, capsys):
    def open_as_told(*words):
        config = parsed("--out", str(tmp_path / "run"), *words)
        settings = dataclasses.asdict(config)
        return RunFolder.find(config.out, settings, resume=config.resume).begin(settings)

    open_as_told("--preset", "toy", "--learning-rate", "0.01", "--lora-rank", "4")
    open_as_told("--resume")
    open_as_told("--resume", "--steps", "40")
    assert "steps 40 (was 20)" in capsys.readouterr().out
    open_as_told("--resume", "--learning-rate", "0.01")
    with pytest.raises(InputError, match=r"learning_rate 0.02 \(was 0.01\)"):
        open_as_told("--resume", "--learning-rate", "0.02")
    with pytest.raises(InputError, match="in use"):
        open_as_told()


def outcome(main, *words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, Config, PRESETS, prog=PROG, argv=words)
    return exit_info.value.code, capsys.readouterr().err


def test_exit_codes(capsys, tmp_path):
    def refuse(config):
        raise InputError("no such teacher")

    def interrupt(config):
        raise KeyboardInterrupt

    assert outcome(lambda config: None, capsys=capsys) == (0, "")
    assert outcome(refuse, capsys=capsys) == (2, "error: no such teacher\n")
    code, err = outcome(refuse, "--stepz", "3", capsys=capsys)
    assert (code, err.count("\n"), err.startswith("error: unknown flag --stepz")) == (2, 1, True)

    out = str(tmp_path / "a run")
    code, err = outcome(interrupt, "--out", out, capsys=capsys)
    assert code == 130 and "To go on, or to start again if nothing was kept: run the same command again" in err
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.json").write_text("{}")
    code, err = outcome(interrupt, "--out", out, capsys=capsys)
    assert code == 130 and f"{PROG} --out '{out}' --resume" in err


def test_a_bug_keeps_its_traceback():
    def bug(config):
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        run_command(bug, Config, PRESETS, prog=PROG, argv=[])
