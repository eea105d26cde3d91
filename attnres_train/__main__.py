"""Command line: `attnres-train COMMAND`, the same as `python -m attnres_train COMMAND`.

Commands import what they need when they run, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from keyword import iskeyword
from types import ModuleType

from attnres_train.command_line.arguments import build_parser
from attnres_train.command_line.parser import check_overrides
from attnres_train.errors import UserError
from attnres_train.screen import complain, settle


def command_module(name: str) -> ModuleType:
    """The module of command ``name``, which has ``run(args)``; its exit code is the process's."""
    file = f"{name}_" if iskeyword(name) else name
    return importlib.import_module(f"attnres_train.commands.{file}")


def main(arguments: list[str] | None = None) -> int:
    _open_standard_streams()
    args = build_parser().parse_args(arguments)
    try:
        _find_own_modules()
        if args.command == "data":
            _take_show(args)
        args.words_given = sys.argv[1:] if arguments is None else arguments
        if hasattr(args, "overrides"):
            check_overrides(args)
        return command_module(args.command).run(args)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except KeyboardInterrupt as stop:  # while preparing: a run that trains is saved first
        number = getattr(stop, "number", signal.SIGINT)
        complain(f"stopped by {signal.Signals(number).name}")
        return 128 + number
    finally:
        settle()


def _open_standard_streams() -> None:
    """Open what the caller has closed (``2>&-``): the next file that is opened would take its
    number, and warnings would be written into it, by this process or a worker."""
    streams = {0: ("stdin", "r"), 1: ("stdout", "w"), 2: ("stderr", "w")}
    for number, (name, mode) in streams.items():
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  (for good)


def _find_own_modules() -> None:
    """Put the working directory on the path, as ``python -m attnres_train`` does: a console script
    has its own folder there instead, and ``module:Name`` of the user's would be found one way and
    not the other."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory is not there any more: cd to one that is") from None
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def _take_show(args: argparse.Namespace) -> None:
    """``data show CONFIG``: the word before the config. Alone, or before KEY=VALUE, it is a config
    of that name."""
    args.show = args.config == "show" and bool(args.overrides) and "=" not in args.overrides[0]
    if args.show:
        args.config, *args.overrides = args.overrides


if __name__ == "__main__":
    sys.exit(main())
