"""The command line's parser: a mistake is one sentence below the usage of the command it is in."""

import argparse
import sys
from typing import Any, NoReturn

from visualbert.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, except that each command itself refuses what it does not know, and says which
    name is nearest.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        options = [text.partition("=")[0] for text in rest if text.startswith("-")]
        if options:
            hint = did_you_mean(options[0], self._option_string_actions)
            self.error(f"there is no option {options[0]}{hint or '; --help lists them'}")
        if rest:
            self.error(f"{rest[0]!r} is one argument too many")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar
            choices = list(action.choices)
            hint = did_you_mean(value, choices)
            raise argparse.ArgumentError(
                None, f"{name} {value!r} is not one of {', '.join(choices)}{hint}"
            )
