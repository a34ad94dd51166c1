"""A frozen dataclass is the whole command line: each field is a flag, with its default and its help.

    @dataclass(frozen=True)
    class Config:
        steps: int = option(300, "optimizer steps", minimum=1)

Values come from, weakest first: the defaults; with --resume, the settings stored in the run folder; --preset;
the flags given. Field types: int, float, bool, str, a tuple of one of them such as tuple[int, ...] (typed as
32,8,4), and any of these `| None` (typed as none).
"""

import argparse
import dataclasses
import difflib
import io
import math
import os
import shlex
import signal
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minidistill.errors import DONE, INTERRUPTED, REFUSED, TERMINATED, InputError, Stopped, Terminated, printable
from minidistill.training.run_folder import NOT_COMPARED
from minidistill.weights.files import FULL, read_json

Config = TypeVar("Config")
Presets = dict[str, dict[str, Any]]

REQUIRED: Any = dataclasses.MISSING  # option(REQUIRED, "...") has no default: the flag must be given
METAVARS = {int: "N", float: "X", str: "TEXT"}
NOUNS = {int: "a whole number", float: "a finite number", str: "text"}
GATHERED = ("lora", "lora_scale")  # `--lora a --lora b` is `--lora a,b`; of any other flag the last one counts
# The sections of --help and the order of the flags, the same in every command; what is not named here ends "run".
GROUPS = {
    "model": "source dest teacher start_from model lightning part unet vae lora lora_scale ema layout dtype",
    "pruning": "recipe remove copy_weights only budget by",
    "stages": "plan stages length pure_noise zero_snr",
    "losses": "pairing loss_weights feature_norm",
    "LoRA": "lora_of lora_rank lora_alpha lora_targets train_text_encoder",
    "data": "data split caption_column images resolution flip caption_dropout random_conditioning image_free "
    "text_states store shard scan_only",
    "optimisation": "batch_size accumulate learning_rate lr_schedule warmup weight_decay max_grad_norm "
    "ema_decay gradient_checkpointing",
    "images": "prompt negative_prompt guidance sampler spacing count latents image strength height width",
    "evaluation": "samples judged parts grid",
    "run": "steps out seed device parallel precision compile deterministic log_every sample_every checkpoint_every "
    "keep_checkpoints",
    "hub": "push_to_hub private",
}
# Field -> what diffusers' training scripts and pipelines call it.
ELSEWHERE = {
    "teacher": "pretrained_model_name_or_path",
    "model": "pretrained_model_name_or_path",
    "vae": "pretrained_vae_model_name_or_path",
    "lora_rank": "rank",
    "data": "train_data_dir dataset_name instance_data_dir",
    "flip": "random_flip",
    "batch_size": "train_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "steps": "max_train_steps num_train_epochs num_inference_steps",
    "lr_schedule": "lr_scheduler",
    "warmup": "lr_warmup_steps",
    "guidance": "guidance_scale",
    "count": "num_images_per_prompt",
    "out": "output_dir",
    "precision": "mixed_precision",
    "sample_every": "validation_steps validation_epochs",
    "checkpoint_every": "checkpointing_steps",
    "keep_checkpoints": "checkpoints_total_limit",
    "resume": "resume_from_checkpoint",
    "push_to_hub": "hub_model_id",
}


def option(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """One setting of a config dataclass, REQUIRED if it has no default.

    Args:
        help: one phrase; it says "default: ..." itself where None stands for something else.
        choices, minimum, maximum: the only words, the smallest and the largest number allowed.
        positional: a word without dashes, as SOURCE in `convert SOURCE DEST`.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def parse(
    config_class: type[Config], presets: Presets | None, argv: Sequence[str], prog: str, description: str | None
) -> Config:
    """Command line words -> config.

    Raises:
        InputError: an unknown flag or preset, a bad or missing value; one line that names it.
    """
    presets = presets or {}
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    parser = _build_parser(config_class, presets, prog, description)
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        raise InputError(_describe_unknown(rest[0], parser))
    given = vars(namespace)
    preset = presets.get(given.pop("preset", ""), {})
    values = {name: value for name, value in {**preset, **given}.items() if name != "comment"}
    if given.get("resume"):  # `--out DIR --resume` is enough; RunFolder.find compares all settings
        file = Path(values.get("out", fields["out"].default)) / "config.json"
        stored = read_json(file) if file.is_file() else {}
        names = [name for name in stored if name in fields and name not in NOT_COMPARED]
        values = {name: _stored_value(file, fields[name], config_class, stored[name]) for name in names} | values
    for name, field in fields.items():  # not by argparse, which would ask for it before it named a mistyped flag
        if name not in values and field.default is REQUIRED:
            raise InputError(f"--{name.replace('_', '-')} is required: {field.metadata['help']}")
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _stored_value(file: Path, field: dataclasses.Field[Any], config_class: type, value: Any) -> Any:
    """A setting of config.json, which people edit, as if it were typed. InputError: it is none, the file is named."""
    hint = typing.get_type_hints(config_class)[field.name]
    if value == [] and _item_type(hint)[1]:
        return ()
    if _item_type(hint)[0] is bool:
        if not isinstance(value, bool):
            raise InputError(f"{file}: {field.name} must be true or false, not {value!r}")
        return value
    text = ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    try:
        return _converter(field.name, hint, field.metadata)(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def run_command(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: Presets | None = None,
    *,
    prog: str,
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse, run `main(config)` and exit with one of the codes in `errors`.

    Any other exception is a bug and keeps its traceback.
    """
    config = None
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that a log file on Windows has no letters for
        sys.stdout.reconfigure(errors="backslashreplace")
    # without the place in the code
    warnings.formatwarning = lambda message, *_, **__: f"note: {printable(str(message))}\n"
    signal.signal(signal.SIGTERM, _terminate)
    try:
        config = parse(config_class, presets, sys.argv[1:] if argv is None else argv, prog, description)
        main(config)
    except InputError as error:
        more = f". {_how_to_resume(config, prog)}" if isinstance(error, Stopped) else ""
        print(f"error: {error}{more}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a path of the user's, which the system refuses: no permission, too long a name
        if error.filename is None and error.errno not in FULL:
            raise
        more = f"; make room. {_how_to_resume(config, prog)}" if error.errno in FULL else ""
        print(f"error: {error.filename or 'cannot print'}: {error.strerror}{more}", file=sys.stderr)
        sys.exit(REFUSED)
    except KeyboardInterrupt as stop:
        word, code = ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
        print(f"\n{word}. {_how_to_resume(config, prog)}", file=sys.stderr)
        sys.exit(code)
    sys.exit(DONE)


def _terminate(*_: object) -> NoReturn:
    """On SIGTERM: files are closed, half-written ones removed, a line says how to resume. A second one ends at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage before its message
        raise InputError(f"{message.removeprefix('argument ')}; --help lists every flag")


def _build_parser(config_class: type, presets: Presets, prog: str, description: str | None) -> argparse.ArgumentParser:
    words = "".join(f"{f.name.upper()} " for f in dataclasses.fields(config_class) if f.metadata["positional"])
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=_list_presets(presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s {words}[FLAGS]",
        allow_abbrev=False,  # a flag we add tomorrow must not change what an abbreviation means today
        argument_default=argparse.SUPPRESS,  # so that the namespace holds only what was given
    )
    if presets:
        convert = _converter("--preset", str, {"choices": list(presets)})
        parser.add_argument("--preset", type=convert, metavar="NAME", help="settings to start from, listed below")
    hints = typing.get_type_hints(config_class)
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    titles = {name: title for title, names in GROUPS.items() for name in names.split()}
    order = list(titles)
    for field in sorted(dataclasses.fields(config_class), key=lambda field: [*order, field.name].index(field.name)):
        _add_flag(groups[titles.get(field.name, "run")], field, hints[field.name])
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    info, is_required, (kind, is_tuple) = field.metadata, field.default is REQUIRED, _item_type(hint)
    flag = field.name if info["positional"] else "--" + field.name.replace("_", "-")
    default = "" if "default: " in info["help"] else f" (default: {_show(field.default)})"
    text = (info["help"] + (" (required)" if is_required else default)).replace("%", "%%")
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    convert = _converter(flag, hint, info)
    settings: dict[str, Any] = {"type": convert, "help": text}
    if info["positional"]:
        settings |= {"metavar": flag.upper(), "nargs": None if is_required else "?"}
    else:
        settings["metavar"] = "|".join(info["choices"] or [METAVARS[kind] + (",..." if is_tuple else "")])
    if field.name in GATHERED:
        settings |= {"action": "extend", "type": lambda text: convert(text) or ()}
    group.add_argument(flag, **settings)


def _item_type(hint: Any) -> tuple[type, bool]:
    """int -> (int, False); tuple[int, ...] | None -> (int, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if is_tuple else hint), is_tuple


def _converter(flag: str, hint: Any, info: Mapping[str, Any]) -> Callable[[str], Any]:
    """A function text -> value of the type `hint`, that refuses with a line naming the flag. info: of its option."""
    kind, is_tuple = _item_type(hint)
    choices, minimum, maximum = (info.get(key) for key in ("choices", "minimum", "maximum"))
    largest = sys.maxsize if kind is int else math.inf  # that a tensor, a length or a generator takes
    low = -largest if minimum is None else minimum
    high = largest if maximum is None else maximum

    def one(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if choices and value not in choices:
            raise InputError(f"{flag} takes {', '.join(choices)}, not '{text}'{_did_you_mean(text, choices)}")
        if kind is str and flag.endswith("prompt"):
            return value
        if not text.strip():
            raise InputError(f"{flag} is empty; if it was given a variable of the shell, that is not set")
        if kind is str:  # a shell leaves the ~ of --out=~/runs as it is
            return os.path.expanduser(value)
        if not -math.inf < value < math.inf:
            raise InputError(f"{flag} takes {NOUNS[kind]}, not '{text}'")
        if not low <= value <= high:
            bound = f"least {_show(low)}" if value < low else f"most {_show(high)}"
            raise InputError(f"{flag} must be at {bound}, not {text}")
        return value

    def convert(text: str) -> Any:
        if text.lower() == "none" and type(None) in typing.get_args(hint):
            return None
        if not is_tuple:
            return one(text)
        return tuple(one(word.strip()) for word in text.split(",") if word.strip()) or one("")  # which refuses it

    return convert


def _did_you_mean(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _describe_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected word '{word}'; --help lists every flag"
    flag = word.split("=", maxsplit=1)[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    spelt = flag.lstrip("-").replace("-", "_")
    for name in [spelt, *(ours for ours, theirs in ELSEWHERE.items() if spelt in theirs.split())]:
        if (ours := "--" + name.replace("_", "-")) in known:
            return f"{flag} is {ours} here; --help lists every flag"
    return f"unknown flag {flag}{_did_you_mean(flag, known)}; --help lists every flag"


def _show(value: Any) -> str:
    """A value as it would be typed after its flag."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list_presets(presets: Presets) -> str | None:
    lines = ["presets (a flag given beside --preset replaces its value):"]
    for name, preset in presets.items():
        settings = [f"{key.replace('_', '-')} {_show(value)}" for key, value in preset.items() if key != "comment"]
        text = f"{name}: {preset['comment']}. {', '.join(settings)}"
        lines.append(textwrap.fill(text, 78, subsequent_indent="    ", break_on_hyphens=False))
    return "\n".join(lines) if presets else None


def _how_to_resume(config: Any, prog: str) -> str:
    out = getattr(config, "out", None)
    if hasattr(config, "resume") and out and (Path(out) / "config.json").is_file():
        return f"To resume from the last checkpoint: {prog} --out {shlex.quote(str(out))} --resume"
    return "To continue, or to start again if nothing was kept: run the same command again."
