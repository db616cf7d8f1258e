"""The command line: one table of commands; their options and help come from signatures and docstrings."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from escaip import __version__
from escaip.errors import DataError, EscaipError, UsageError

COMMANDS: dict[str, dict[str, str]] = {
    "Training": {
        "fit": "escaip.train.commands:fit",
        "validate": "escaip.train.commands:validate",
        "test": "escaip.train.commands:test",
        "distil": "escaip.distil.commands:distil",
    },
    "Data": {
        "data list": "escaip.data.commands:list_cards",
        "data info": "escaip.data.commands:info",
        "data download": "escaip.data.commands:download",
        "data prepare": "escaip.data.commands:prepare",
        "data inspect": "escaip.data.commands:inspect",
        "data convert": "escaip.data.commands:convert",
    },
    "Using a model": {
        "evaluate": "escaip.evaluate.commands:evaluate",
        "predict": "escaip.evaluate.commands:predict",
        "relax": "escaip.simulate.commands:relax",
        "md": "escaip.simulate.commands:md",
        "analyze": "escaip.simulate.commands:analyze",
        "select": "escaip.simulate.commands:select",
        "check": "escaip.simulate.commands:check",
    },
    "Properties": {
        "vibrations": "escaip.properties.commands:vibrations",
        "eos": "escaip.properties.commands:eos",
        "elastic": "escaip.properties.commands:elastic",
        "phonons": "escaip.properties.commands:phonons",
        "neb": "escaip.properties.commands:neb",
    },
    "Scaling studies": {
        "scaling run": "escaip.scaling.commands:run",
        "scaling fit": "escaip.scaling.commands:fit",
        "scaling plot": "escaip.scaling.commands:plot",
    },
    "Models and this installation": {
        "export": "escaip.potential.commands:export",
        "import fairchem": "escaip.interop.commands:fairchem",
        "info": "escaip.info:info",
        "examples": "escaip.info:examples",
        "recipes": "escaip.info:recipes",
        "completion": "escaip.cli:completion",
    },
}
"""Group -> words of the command -> ``module:function``. The module imports nothing heavy until it is called."""

_TABLE = {name: target for group in COMMANDS.values() for name, target in group.items()}
_LIGHTNING = ("fit", "validate", "test")
_EMPTY, _ABSENT = inspect.Parameter.empty, object()
_FILES = {
    "model": ("model file", "pass a .escaip or .ckpt file, or an example of escaip examples"),
    "structure": ("structure", "pass a file that ASE reads, or an example of escaip examples"),
    "data": ("data", "pass a file, a folder or a pattern"),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command.

    Attributes:
        name: in Python.
        type: of one value, without ``None``, ``list`` and annotations.
        repeated: whether several values are given.
        kind: ``"model"``, ``"structure"`` or ``"data"`` for a file that must exist, else ``""``.
        default: ``_EMPTY`` where a value is required, ``_ABSENT`` for an option that is passed on only where given.
        positional: whether it is given by place.
        help: from the docstring.
    """

    name: str
    type: Any
    repeated: bool
    kind: str
    default: Any
    positional: bool
    help: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        0 on success, 2 for a usage error, 130 after Ctrl-C, 143 after SIGTERM, 1 otherwise.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with warnings.catch_warnings():
        if not debug:
            _plain_warnings()
        try:
            _run(arguments)
        except SystemExit as stop:  # --help, --version
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:  # the reader of a pipe, such as head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if debug:
                raise
            message, status = _explain(error)
            return _fail(message, status)
    return 0


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] == "--version":
        print(f"escaip {__version__}")
        return
    name, rest = _find(arguments)
    if name in _LIGHTNING:
        _function(name)(rest)
        return
    parameters = parameters_of(_function(name))
    values = parser_of(name).parse_args(_pairs_as_keys(rest, parameters)).as_dict()
    given = {p.name: values[p.name] for p in parameters if p.default is not _ABSENT or _was_given(values[p.name])}
    for parameter in parameters:
        _check_exists(parameter, given.get(parameter.name))
    _function(name)(**given)


def _was_given(value: Any) -> bool:
    return value is not None and value is not False


def _pairs_as_keys(arguments: list[str], parameters: list[Parameter]) -> list[str]:
    """Writes ``--units length=bohr,energy=hartree`` as ``--units.length=bohr --units.energy=hartree``."""
    mappings = {f"--{p.name}" for p in parameters if typing.get_origin(p.type) is dict}
    written, option = [], ""
    for argument in arguments:
        if argument in mappings:
            option = argument
        elif option and not argument.startswith("-") and "=" in argument:
            written += [f"{option}.{pair.strip()}" for pair in argument.split(",")]
        elif option and written[-1:] and not argument.startswith("-") and not written[-1].startswith(f"{option}."):
            raise UsageError(f"{option} {argument!r} is not understood: write {option}.NAME VALUE")
        else:
            written, option = [*written, argument], ""
    return written


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits arguments into the name of a command and the rest; a group alone prints its commands."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in _TABLE and len(arguments) >= words:
            return name, arguments[words:]
    group = [name for name in _TABLE if name.startswith(f"{arguments[0]} ")]
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(f"usage: escaip {arguments[0]} COMMAND\n\n" + "\n".join(_summaries(group)))
        raise SystemExit(0)
    wrong = " ".join(arguments[: 2 if group else 1])
    close = difflib.get_close_matches(wrong, group or _TABLE, 1)
    hint = f"did you mean {close[0]}?" if close else "see escaip --help"
    raise UsageError(f"escaip has no command {wrong!r}: {hint}")


def overview() -> str:
    """Returns the help of the program: every command with its summary, by group."""
    lines = ["usage: escaip COMMAND ...", "", "Attention-based interatomic potentials: from data to simulations.", ""]
    for group, commands in COMMANDS.items():
        lines += [f"{group}:", *_summaries(commands), ""]
    return "\n".join([
        *lines, "escaip COMMAND --help explains a command. --debug shows the traceback of an error and every warning.",
    ])  # fmt: skip


def _summaries(names: Sequence[str] | dict[str, str]) -> list[str]:
    width = max(map(len, _TABLE)) + 2
    return [f"  {name:<{width}}{_documentation(_function(name))[0]}" for name in names]


def _function(name: str) -> Callable[..., Any]:
    module, _, function = _TABLE[name].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _documentation(thing: Any) -> tuple[str, dict[str, str], str]:
    """Returns the summary, the help of each parameter and the example of a docstring."""
    import docstring_parser

    text = inspect.getdoc(thing) or ""
    parsed = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    example = re.search(r"^Example: *(.+)$", text, re.MULTILINE)
    helps = {p.arg_name: " ".join((p.description or "").split()) for p in parsed.params}
    return (parsed.short_description or "").rstrip("."), helps, example.group(1) if example else ""


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """Returns the parameters of a command, with those of the ``TypedDict`` that it unpacks."""
    hints = typing.get_type_hints(function, include_extras=True)
    helps, found = _documentation(function)[1], []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            options = typing.get_args(hints[name])[0]
            inner = _option_helps(options)
            for key, hint in typing.get_type_hints(options, include_extras=True).items():
                found.append(_parameter(key, hint, _ABSENT, False, inner.get(key, "")))
        else:
            positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            found.append(_parameter(name, hints[name], parameter.default, positional, helps.get(name, "")))
    return found


def _option_helps(options: Any) -> dict[str, str]:
    inherited = [_option_helps(base) for base in getattr(options, "__orig_bases__", ()) if hasattr(base, "__total__")]
    return {name: text for helps in (*inherited, _documentation(options)[1]) for name, text in helps.items()}


def _parameter(name: str, hint: Any, default: Any, positional: bool, text: str) -> Parameter:
    kind, repeated = "", False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        hint, repeated = typing.get_args(hint)[0], True
    if typing.get_origin(hint) is typing.Annotated:
        hint, kind = typing.get_args(hint)[:2]
    return Parameter(name, hint, repeated, kind, default, positional, text)


def parser_of(name: str) -> Any:
    """Returns the ``ArgumentParser`` of a command."""
    from jsonargparse import ActionYesNo, ArgumentParser

    class Parser(ArgumentParser):
        """Reports an error in one line."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(f"{_plain(message, options)}: see escaip {name} --help") from ex

    summary, _, example = _documentation(_function(name))
    parser = Parser(
        prog=f"escaip {name}", description=f"{summary}.", epilog=f"example: {example}" if example else None,
        formatter_class=argparse.HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parameters = parameters_of(_function(name))
    options = [f"--{p.name.replace('_', '-')}" for p in parameters if not p.positional]
    for p in parameters:
        flag = p.name if p.positional else f"--{p.name.replace('_', '-')}"
        settings: dict[str, Any] = {"help": _help(p), "type": p.type}
        if p.type is bool:
            settings = {"help": _help(p), "action": ActionYesNo(no_prefix="no-") if p.default is True else "store_true"}
        elif typing.get_origin(p.type) is tuple:
            settings.update(nargs=len(typing.get_args(p.type)), type=typing.get_args(p.type)[0])
        elif typing.get_origin(p.type) is typing.Literal and not p.repeated:
            settings.update(metavar="{" + ",".join(typing.get_args(p.type)) + "}")
        if not p.positional and p.type is not bool:
            settings.setdefault("metavar", "NAME=VALUE" if typing.get_origin(p.type) is dict else p.name.upper())
        if p.positional:
            settings["metavar"] = p.name.upper()
        if p.repeated:
            settings["nargs"] = "+"
        if p.positional and p.default not in (_EMPTY, _ABSENT):
            settings.update(nargs="*" if p.repeated else "?", default=p.default)
        elif not p.positional and p.type is not bool:
            settings.update(required=p.default is _EMPTY, default=None if p.default in (_EMPTY, _ABSENT) else p.default)
        elif p.default is True:
            settings["default"] = True
        parser.add_argument(flag, **settings)
    return parser


def _help(p: Parameter) -> str:
    shown = p.default not in (_EMPTY, _ABSENT, None) and not isinstance(p.default, bool) and "(default" not in p.help
    text = f"{p.help} (default: {p.default})" if shown else p.help
    return text.replace("%", "%%")


def _plain(message: str, options: Sequence[str]) -> str:
    """Turns a message of the parser into one that names the option and what it takes."""
    message = _one_line(message)
    if found := re.match(r'Parser key "([\w.]+)": *(.*)', message):
        option, reason = f"--{found[1].replace('_', '-')}", found[2]
        value = reason.rpartition("Got value: ")[2]
        if choices := re.search(r"Literal\[(.*?)\]", reason):
            allowed = ", ".join(re.findall("'(.*?)'", choices[1]))
            return f"{option} is {value!r}: choose {allowed}"
        kind = "a whole number" if "int" in reason else "a number" if "float" in reason else "of another kind"
        return f"{option} is {value!r}: it must be {kind}"
    if found := re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        given = found[1].partition("=")[0]
        close = [option for option in options if option.startswith(given)] or difflib.get_close_matches(given, options)
        return f"{found[1]} is no option" + (f", did you mean {close[0]}?" if close else "")
    return message


def _check_exists(parameter: Parameter, value: Any) -> None:
    """Raises before anything heavy is imported where a file does not exist."""
    for path in value if isinstance(value, list) else [value]:
        if parameter.kind and path is not None:
            from escaip.files import resolve

            if not Path(resolve(path)).expanduser().exists() and not re.search(r"[*?\[]", path):
                raise DataError(f"{_FILES[parameter.kind][0]} {path} does not exist: {_FILES[parameter.kind][1]}")


def completion(shell: Literal["bash", "zsh", "tcsh"]) -> None:
    """Prints a script that completes commands, options, recipes and examples.

    Args:
        shell: your shell

    Example: escaip completion bash > ~/.local/share/bash-completion/completions/escaip
    """
    import shtab

    root = argparse.ArgumentParser(prog="escaip")
    _add_completions(root.add_subparsers(), "")
    print(shtab.complete(root, shell))


def _add_completions(commands: Any, prefix: str) -> None:
    from escaip.files import list_configs, list_examples

    for word in dict.fromkeys(name.removeprefix(prefix).split()[0] for name in _TABLE if name.startswith(prefix)):
        name = f"{prefix}{word}"
        if name not in _TABLE:
            _add_completions(commands.add_parser(word, help=f"{word} commands").add_subparsers(), f"{name} ")
            continue
        parser = commands.add_parser(word, help=_documentation(_function(name))[0].replace("%", "%%"))
        if name in _LIGHTNING:
            parser.add_argument("--config", choices=list_configs(), help="recipe or file")
            for option in ("--ckpt_path", "--name", "--out", "--data.train", "--trainer.max_epochs"):
                parser.add_argument(option)
            continue
        for p in parameters_of(_function(name)):
            choices = list(typing.get_args(p.type)) if typing.get_origin(p.type) is typing.Literal else None
            if p.kind in ("model", "structure"):
                choices = [f"example:{name}" for name in list_examples(p.kind)]
            flag = p.name if p.positional else f"--{p.name.replace('_', '-')}"
            takes = {"action": "store_true"} if p.type is bool else {"choices": choices}
            parser.add_argument(flag, help=_help(p), **takes)


def _plain_warnings() -> None:
    """Shows warnings of this package as one line each, and hides those of others, which are for developers."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"escaip: warning: {_one_line(message)}", file=sys.stderr)

    warnings.showwarning = show  # restored by catch_warnings
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"escaip\b")


def _explain(error: Exception) -> tuple[str, int]:
    """Returns one line and an exit status for any error."""
    if isinstance(error, EscaipError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror.lower()}: check the path, its permissions and the space on the disk", 1
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: use a smaller structure, fewer atoms per batch, or --device cpu", 1
    return f"unexpected {type(error).__name__}: {error}: run again with --debug and report what it prints", 1


def _fail(message: str, status: int) -> int:
    print(f"escaip: error: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
