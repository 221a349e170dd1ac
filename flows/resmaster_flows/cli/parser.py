"""The parser of the command line: a mistyped word is answered with the word that it may have meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from resmaster_stages.errors import did_you_mean
from resmaster_stages.redaction import LINE_CHARACTERS, printable_lines, shortened


class Parser(argparse.ArgumentParser):
    """argparse's parser, for the command and for each verb. Says a wrong word before what is missing because of it.

    fill: adds the arguments, when they are first needed.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._filler = fill

    def fill(self) -> None:
        """Add the arguments, if that has not been done yet."""
        filler, self._filler = self._filler, None
        if filler:
            filler(self)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's. An option that is none of this parser ends the program, as every mistake does."""
        self.fill()
        words = list(sys.argv[1:] if args is None else args)
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for option in self._options(words):
            if not any(each.startswith(option) for each in known):  # argparse takes the beginning of an option, too
                self.error(f"unknown option {option}{did_you_mean(option, known)}; see: {self.prog} --help")
        return super().parse_known_args(words, namespace)

    def _options(self, words: Sequence[str]) -> Iterator[str]:
        """The long options among the words, without those behind a verb, which are the verb's own."""
        for word in takewhile(lambda word: word != "--", words):
            if word.startswith("--") and " " not in word:
                yield word.partition("=")[0]
            elif self._subparsers is not None and not word.startswith("-"):
                return

    def error(self, message: str) -> NoReturn:
        """As argparse's: a mistake ends the program. The message repeats words of the command line, but long
        ones not whole."""
        super().error(shortened(printable_lines(message), LINE_CHARACTERS))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            meant = did_you_mean(value, action.choices)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}{meant}; choose from {', '.join(map(str, action.choices))}"
            )
