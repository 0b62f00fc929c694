"""What the numbers and lists of a configuration may be: one rule for each key.

Each config module states the rules of its keys beside their defaults; `check` applies them all
before anything else looks at a value. Choices between words, and what depends on several keys, are
checked by the modules themselves.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from tract_det.errors import UserError

_MANY = 2**31 - 1  # counts and sizes end where no machine follows


class Number(NamedTuple):
    """A finite number within bounds.

    Attributes:
        low: lower bound.
        high: upper bound.
        above: whether `low` itself is excluded.
        below: whether `high` itself is excluded.
        also: a value outside the bounds that has a meaning of its own; None = none.
        whole: whether it must be a whole number.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None
    whole: bool = False

    def refusal(self, value: Any) -> str:
        """Why the value is refused, in words; "" if it is not."""
        if type(value) not in (int, float):
            return "it must be a number"
        if not math.isfinite(value):
            return "it must be a finite number"
        if self.whole and type(value) is not int:
            return "it must be a whole number"
        if value == self.also:
            return ""
        if value > _MANY and self.high == _MANY:
            return f"it must be at most {_MANY}"
        too_low = value < self.low or (self.above and value == self.low)
        too_high = value > self.high or (self.below and value == self.high)
        return self.words() if too_low or too_high else ""

    def words(self) -> str:
        """The bounds, in words that end a sentence."""
        other = "" if self.also is None else f", or {self.also:g}"
        if self.high >= _MANY and self.low in (0, 1):
            is_positive = self.above or self.low == 1
            return ("it must be positive" if is_positive else "it must not be negative") + other
        if self.high == math.inf:
            return f"it must be {'above' if self.above else 'at least'} {self.low:g}{other}"
        if self.above or self.below:
            low = f"{'above' if self.above else 'at least'} {self.low:g}"
            high = f"{'below' if self.below else 'at most'} {self.high:g}"
            return f"it must be {low} and {high}{other}"
        return f"it takes {self.low:g} to {self.high:g}{other}"


class Numbers(NamedTuple):
    """A list of numbers.

    Attributes:
        each: rule of its items.
        may_be_empty: whether it may have none.
    """

    each: Number = Number()
    may_be_empty: bool = True


class Names(NamedTuple):
    """A list of words."""


class Anything(NamedTuple):
    """A list that something else checks."""


Rule = Number | Numbers | Names | Anything

POSITIVE = Number(0, above=True)
NOT_NEGATIVE = Number(0)
FRACTION = Number(0, 1)
BELOW_ONE = Number(0, 1, below=True)
COUNT = Number(1, _MANY, whole=True)
COUNT_OR_NONE = Number(0, _MANY, whole=True)


def check(cfg: CfgNode, rules: Mapping[str, Rule]) -> None:
    """Refuses what a rule does not allow.

    Raises:
        UserError: the message names the key.
    """
    for key, rule in rules.items():
        value: Any = cfg
        for part in key.split("."):
            value = value[part]
        _check_value(key, value, rule)


def _check_value(key: str, value: Any, rule: Rule) -> None:
    if isinstance(rule, Number):
        if refusal := rule.refusal(value):
            raise UserError(f"{key} is {value}: {refusal}")
    elif isinstance(rule, Names):
        others = [item for item in value if not isinstance(item, str)]
        if others:
            raise UserError(f"{key} takes names, not {others}: quote them")
    elif isinstance(rule, Numbers):
        words = [item for item in value if type(item) not in (int, float)]
        if words:
            raise UserError(f"{key} takes numbers, not {words}")
        if not value and not rule.may_be_empty:
            raise UserError(f"{key} is empty: it takes one number or more")
        for item in value:
            if refusal := rule.each.refusal(item):
                raise UserError(f"{key} {item}: {refusal}")
