r"""Patterns over layer names, matched in time linear in the name: no pattern can hang the program.

The syntax is what the engine's regular expressions (Rust's ``regex``) and Python's have in common::

    abc . \. \d \w \s \D \W \S [a-z_] [^.]      one character
    (ab|cd) (?:ab)                              groups and alternatives
    * + ? {2} {2,} {2,4}                        repetitions; a ? after them changes nothing here
    ^ $                                         begin and end of the name
    (?i) at the very beginning                  upper and lower case are the same

What needs backtracking (back references, look-around) is not there.  A pattern is found anywhere in the name.  It is
compiled to a nondeterministic automaton (Thompson's construction), and that, as it is used, to a deterministic one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from uqff.errors import FormatError
from uqff.limits import MAX_PATTERN

__all__ = ["Pattern"]

Test = Callable[[str], bool]

_CLASSES: Final[dict[str, Test]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r"}

_MOST_CACHED: Final = 1000
"""States of the deterministic automaton that are remembered before it is built anew."""

_MOST_NESTED: Final = 50
"""Groups within groups: the compiler calls itself for each."""


class _Node(NamedTuple):
    """A state: reads a character that passes ``test``, or nothing if that is None, and goes on to ``after``.

    ``where`` is ``^`` or ``$`` for a state that may only be passed there.
    """

    test: Test | None
    after: tuple[int, ...]
    where: str = ""


class Pattern:
    """A compiled pattern."""

    def __init__(self, text: str) -> None:
        """Compile.

        Raises:
            FormatError: the pattern has an error, uses what is not supported, or is too large; the column is named.
        """
        self.text = text
        self._nodes: list[_Node] = []
        self._fold = text.startswith("(?i)")
        self._at = 4 if self._fold else 0
        self._depth = 0
        self._size = 0
        start, ends = self._alternatives()
        if self._at < len(text):
            raise self._error("unmatched )")
        self._end = self._add(None, ())
        self._join(ends, self._end)
        self._start = start if start is not None else self._end
        self._first = self._closure({self._start}, "^")
        self._again = self._closure({self._start}, "")
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def search(self, name: str) -> bool:
        """Whether the pattern is found anywhere in the name."""
        if self._fold:
            name = name.lower()
        states = self._first
        for character in name:
            if self._end in states:
                return True
            states = self._move(states, character)
        return self._end in states or self._end in self._closure(states, "$" if name else "^$")

    def _move(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = (states, character)
        found = self._moves.get(key)
        if found is None:
            reached = {
                state
                for node in (self._nodes[n] for n in states)
                if node.test is not None and node.test(character)
                for state in node.after
            }
            found = self._closure(reached, "") | self._again
            if len(self._moves) >= _MOST_CACHED:
                self._moves.clear()
            self._moves[key] = found
        return found

    def _closure(self, states: set[int] | frozenset[int], where: str) -> frozenset[int]:
        """All states that are reached without reading a character, at that place of the name."""
        seen: set[int] = set()
        waiting = list(states)
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            node = self._nodes[number]
            if node.test is None and (not node.where or node.where in where):
                waiting.extend(node.after)
        return frozenset(seen)

    # Compiling: every part gives its first state (None for the empty part) and the states whose exits are open.

    def _alternatives(self) -> tuple[int | None, list[int]]:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        if len(branches) == 1:
            return branches[0]
        fork = self._add(None, ())
        ends: list[int] = []
        for start, exits in branches:
            if start is None:
                start = self._add(None, ())
                exits = [start]
            self._join([fork], start)
            ends += exits
        return fork, ends

    def _sequence(self) -> tuple[int | None, list[int]]:
        first: int | None = None
        ends: list[int] = []
        while self._at < len(self.text) and self.text[self._at] not in "|)":
            start, exits = self._repeated()
            if start is None:
                continue
            if first is None:
                first = start
            else:
                self._join(ends, start)
            ends = exits
        return first, ends

    def _repeated(self) -> tuple[int | None, list[int]]:
        begin = self._at
        start, ends = self._atom()
        low_high = self._repetition()
        if low_high is None:
            return start, ends
        after = self._at
        low, high = low_high
        first, open_ends = None, []
        for turn in range(max(low, 1) if high is None else high):
            if turn:
                self._at = begin
                start, ends = self._atom()
            if start is None:
                break
            last = high is None and turn == max(low, 1) - 1
            if turn >= low:
                # An optional turn, or the first of any number: may be passed by.
                fork = self._add(None, (start,))
                entry, skips = fork, [fork]
            else:
                entry, skips = start, []
            if last:
                loop = self._add(None, (entry if turn >= low else start,))
                self._join(ends, loop)
                ends = [loop]
            if first is None:
                first = entry
            else:
                self._join(open_ends, entry)
            open_ends = ends + skips
        self._at = after
        return first, open_ends

    def _repetition(self) -> tuple[int, int | None] | None:
        if self._at >= len(self.text) or self.text[self._at] not in "*+?{":
            return None
        sign = self.text[self._at]
        self._at += 1
        bounds: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign, (0, 0))
        if sign == "{":
            bounds = self._braces()
        self._take("?")
        if self._at < len(self.text) and self.text[self._at] in "*+?{":
            raise self._error("nothing to repeat")
        return bounds

    def _braces(self) -> tuple[int, int | None]:
        close = self.text.find("}", self._at)
        low, comma, high = self.text[self._at : max(close, self._at)].partition(",")
        if close < 0 or not low.isdecimal() or not (high.isdecimal() or not high) or len(low + high) > 6:
            raise self._error("malformed repetition")
        self._at = close + 1
        most = None if comma and not high else int(high or low)
        if most is not None and most < int(low):
            raise self._error("malformed repetition")
        return int(low), most

    def _atom(self) -> tuple[int | None, list[int]]:
        character = self.text[self._at]
        self._at += 1
        if character == "(":
            if self._take("?") and not self._take(":"):
                raise self._error("only (?: is supported here")
            self._depth += 1
            if self._depth > _MOST_NESTED:
                raise self._error(f"more than {_MOST_NESTED} nested groups")
            part = self._alternatives()
            if not self._take(")"):
                raise self._error("missing )")
            self._depth -= 1
            return part
        if character in "*+?{":
            raise self._error("nothing to repeat")
        if character in "^$":
            node = self._add(None, (), character)
        elif character == ".":
            node = self._add(lambda c: c != "\n", ())
        elif character == "[":
            node = self._add(self._class(), ())
        else:
            node = self._add(self._escape() if character == "\\" else self._equal(character), ())
        return node, [node]

    def _equal(self, character: str) -> Test:
        wanted = character.lower() if self._fold else character
        return lambda c: c == wanted

    def _escape(self) -> Test:
        character = self._next("a character after \\")
        if character.lower() in _CLASSES:
            test = _CLASSES[character.lower()]
            return test if character.islower() else lambda c: not test(c)
        if character.isalnum() and character not in _ESCAPES:
            raise self._error(f"\\{character} is not supported")
        return self._equal(_ESCAPES.get(character, character))

    def _class(self) -> Test:
        negated = self._take("^")
        tests: list[Test] = []
        while not tests or not self._take("]"):
            self._count()
            character = self._next("]")
            if character == "[":
                raise self._error("[ in a class: write \\[")
            if character == "\\":
                tests.append(self._escape())
                continue
            if self._at + 1 < len(self.text) and self.text[self._at] == "-" and self.text[self._at + 1] != "]":
                self._at += 1
                tests.append(self._range(character, self._next("]")))
            else:
                tests.append(self._equal(character))
        return lambda c: any(test(c) for test in tests) is not negated

    def _range(self, low: str, high: str) -> Test:
        if high == "\\" or low > high:
            raise self._error("malformed range")
        if self._fold:
            return lambda c: low <= c <= high or low <= c.upper() <= high
        return lambda c: low <= c <= high

    def _next(self, expected: str) -> str:
        if self._at >= len(self.text):
            raise self._error(f"missing {expected}")
        self._at += 1
        return self.text[self._at - 1]

    def _take(self, character: str) -> bool:
        taken = self.text[self._at : self._at + 1] == character
        self._at += taken
        return taken

    def _add(self, test: Test | None, after: tuple[int, ...], where: str = "") -> int:
        self._count()
        self._nodes.append(_Node(test, after, where))
        return len(self._nodes) - 1

    def _count(self) -> None:
        """One more state, or member of a class."""
        self._size += 1
        if self._size > MAX_PATTERN:
            raise self._error(f"the pattern has more than {MAX_PATTERN} states")

    def _join(self, ends: list[int], target: int) -> None:
        for end in ends:
            node = self._nodes[end]
            self._nodes[end] = node._replace(after=(*node.after, target))

    def _error(self, problem: str) -> FormatError:
        return FormatError(f"bad pattern: {problem}", field=f"column {self._at}", got=self.text[:200])
