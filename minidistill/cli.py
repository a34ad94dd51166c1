"""A frozen dataclass is the whole command line: each field is a flag, its default and its help.

    @dataclass(frozen=True)
    class Config:
        steps: int = option(300, "optimizer steps", minimum=1)
        resume: bool = option(False, "go on with the run in --out")

    PRESETS = {"toy": {"comment": "300 steps, 2 min on 2 CPU cores", "steps": 300}}

    if __name__ == "__main__":
        run_command(train, Config, PRESETS, prog="python -m minidistill.train_kd", description=__doc__)

Values come from, weakest first: the defaults; with --resume, the settings stored in the run folder; --preset;
the flags given. Field types: int, float, bool, str, a tuple of one of them such as tuple[int, ...] (typed as
32,8,4), and any of these `| None` (typed as none).
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import shlex
import sys
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minidistill.errors import InputError
from minidistill.metrics.cost import keep_freed_memory
from minidistill.training.run_folder import NOT_COMPARED
from minidistill.weights.files import read_json

Config = TypeVar("Config")
Presets = dict[str, dict[str, Any]]

REQUIRED = dataclasses.MISSING  # option(REQUIRED, "...") has no default: the flag must be given
METAVARS = {int: "N", float: "X", str: "TEXT"}
NOUNS = {int: "a whole number", float: "a finite number", str: "text"}


def option(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    positional: bool = False,
) -> Any:
    """One setting of a config dataclass.

    Args:
        default: REQUIRED if there is none.
        choices: the only words allowed.
        minimum, maximum: the smallest and the largest number allowed.
        positional: a word without dashes, as SOURCE in `convert SOURCE DEST`.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def parse(
    config_class: type[Config],
    presets: Presets | None,
    argv: Sequence[str],
    prog: str,
    description: str | None,
) -> Config:
    """Command line words -> config.

    Raises:
        InputError: an unknown flag or preset, a bad or missing value; one line that names it.
    """
    presets = presets or {}
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, preset in presets.items():
        if unknown := set(preset) - set(fields) - {"comment"}:
            raise ValueError(f"preset {name}: {config_class.__name__} has no field {sorted(unknown)}")

    parser = _build_parser(config_class, presets, prog, description)
    namespace, rest = parser.parse_known_args(list(argv))
    if rest:
        raise InputError(_describe_unknown(rest[0], parser))
    given = {name: value for name, value in vars(namespace).items() if name in fields}
    preset = dict(presets[namespace.preset]) if "preset" in namespace else {}
    preset.pop("comment", None)

    values = {**preset, **given}
    if given.get("resume") and "out" in fields:
        values = {**_stored_settings(values.get("out", fields["out"].default), fields), **values}
    for name, field in fields.items():
        if name not in values and field.default is REQUIRED:
            raise InputError(f"{_flag(field)} is required: {field.metadata['help']}")
    return config_class(**values)


def run_command(
    main: Callable[[Config], None],
    config_class: type[Config],
    presets: Presets | None = None,
    *,
    prog: str,
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse, run `main(config)` and exit: 0 done, 2 input refused, 130 interrupted (Ctrl-C).

    Any other exception is a bug and keeps its traceback.
    """
    config = None
    keep_freed_memory()
    try:
        with _short_warnings():
            config = parse(config_class, presets, sys.argv[1:] if argv is None else argv, prog, description)
            main(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted. {_how_to_go_on(config, prog)}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """In a terminal a warning is what it says, in one line, and not where in the code it was said."""
    usual = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = usual


# ------------------------------------------------------------------------------------------------------------
# flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage before its message
        raise InputError(f"{message.removeprefix('argument ')}; --help lists every flag")


def _build_parser(config_class: type, presets: Presets, prog: str, description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=_list_presets(presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [FLAGS]",
        allow_abbrev=False,  # a flag we add tomorrow must not change what an abbreviation means today
        argument_default=argparse.SUPPRESS,  # so that the namespace holds only what was given
    )
    if presets:
        convert = _converter("--preset", str, list(presets))
        text = "start from the settings of a preset (below)"
        parser.add_argument("--preset", type=convert, metavar="NAME", help=text)
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _add_flag(parser, field, hints[field.name])
    return parser


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    flag, info = _flag(field), field.metadata
    kind, is_tuple = _item_type(hint, field.name)
    text = info["help"].replace("%", "%%")
    if kind is bool:
        off = f"--no-{flag[2:]}"
        state = f"default: on; {off} turns it off" if field.default else "default: off"
        parser.add_argument(flag, action="store_true", help=f"{text} ({state})")
        parser.add_argument(off, dest=field.name, action="store_false", help=argparse.SUPPRESS)
        return
    metavar = "|".join(info["choices"]) if info["choices"] else METAVARS[kind] + (",..." if is_tuple else "")
    required = field.default is REQUIRED
    if "(default:" not in text:  # of None the help says itself what is taken
        text += " (required)" if required else f" (default: {_show(field.default)})".replace("%", "%%")
    convert = _converter(flag, hint, info["choices"], info["minimum"], info["maximum"])
    if info["positional"]:
        parser.add_argument(flag, type=convert, nargs=None if required else "?", metavar=flag.upper(), help=text)
    else:
        action = _Gather if is_tuple else "store"
        parser.add_argument(flag, type=convert, metavar=metavar, help=text, action=action)


class _Gather(argparse.Action):
    """`--lora a,b` and `--lora a --lora b` are the same."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if None in (before, values) else before + values)


def _flag(field: dataclasses.Field) -> str:
    return field.name if field.metadata["positional"] else "--" + field.name.replace("_", "-")


def _item_type(hint: Any, name: str = "") -> tuple[type, bool]:
    """int -> (int, False); tuple[int, ...] | None -> (int, True)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if is_tuple else hint
    if kind not in (int, float, str, bool):
        raise TypeError(f"field {name}: no flag can be made of type {hint}")
    return kind, is_tuple


def _converter(
    flag: str, hint: Any, choices: Collection[str] | None, minimum: float | None = None, maximum: float | None = None
) -> Callable[[str], Any]:
    """A function text -> value of the type `hint`, that refuses with a line naming the flag."""
    kind, is_tuple = _item_type(hint)
    optional = type(None) in typing.get_args(hint)

    def one(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if kind is int and abs(value) > sys.maxsize:  # more than a tensor, a length or a generator takes
            raise InputError(f"{flag} takes a whole number of at most 63 bits, not {text}")
        if kind is not str and not math.isfinite(value):
            raise InputError(f"{flag} takes {NOUNS[kind]}, not '{text}'")
        if choices and value not in choices:
            raise InputError(f"{flag} takes {', '.join(choices)}, not '{text}'{_did_you_mean(text, choices)}")
        if minimum is not None and value < minimum:
            raise InputError(f"{flag} must be at least {_show(minimum)}, not {text}")
        if maximum is not None and value > maximum:
            raise InputError(f"{flag} must be at most {_show(maximum)}, not {text}")
        return value

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if not is_tuple:
            return one(text)
        return tuple(one(word.strip()) for word in text.split(",") if word.strip())

    return convert


def _did_you_mean(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _describe_unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected word '{word}'; --help lists every flag"
    flag = word.split("=", maxsplit=1)[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    return f"unknown flag {flag}{_did_you_mean(flag, known)}; --help lists every flag"


def _show(value: Any) -> str:
    """A value as it would be typed after its flag."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list_presets(presets: Presets) -> str | None:
    if not presets:
        return None
    lines = ["presets (flags given beside --preset win):"]
    width = max(map(len, presets))
    for name, preset in presets.items():
        flags = [_as_typed(key, value) for key, value in preset.items() if key != "comment"]
        lines.append(f"  {name:{width}}  {preset.get('comment', '')}")
        lines.append(f"  {'':{width}}  {' '.join(flags)}")
    return "\n".join(lines)


def _as_typed(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {_show(value)}"


# ------------------------------------------------------------------------------------------------------------
# going on


def _stored_settings(out: str, fields: dict[str, dataclasses.Field]) -> dict[str, Any]:
    """The settings of the run in `out`: `--out DIR --resume` is enough. RunFolder.find compares them all."""
    path = Path(out) / "config.json"
    if not path.is_file():  # RunFolder.find refuses
        return {}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_json(path).items()
        if name in fields and name not in NOT_COMPARED
    }


def _how_to_go_on(config: Any, prog: str) -> str:
    out = getattr(config, "out", None)
    if hasattr(config, "resume") and out and (Path(out) / "config.json").is_file():
        return f"To go on from the last checkpoint: {prog} --out {shlex.quote(str(out))} --resume"
    return "To go on, or to start again if nothing was kept: run the same command again."
