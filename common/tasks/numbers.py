r"""Numbers in text: what an expected answer is worth, and which number a model's text gives as
its answer.

A plain number stands for itself: `-7`, `1,234.50`, `3/4`, `\frac{3}{4}`, `3\frac{1}{2}` (3.5),
`1e3`, with a unit or without. Expressions (`2^{10}`, `5x`, `12!`, `\sqrt{2}`), ratios, lists and
ranges are none, and no part of them is. Nor are recurring decimals (`0.(3)`, `0.\overline{3}`),
digits in groups with a space between (`12 000`), which may be one number or two, and digits that
commas group otherwise than by thousands (`1,2345`, `0,125`).
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_FRACTION = rf"""(?:
    (?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})
  | \\[dt]?frac\s*(?:
        \{{\s*(?P<latex_top>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<latex_bottom>-?{_DECIMAL})\s*\}}
      | (?P<digit_top>\d)\s*(?P<digit_bottom>\d) ) )"""
_NUMBER = rf"""(?P<sign>[-+]?)[€£]?(?:
    (?: (?P<whole>{_WHOLE}) (?: \s+ | (?=\\) ) )? {_FRACTION}
  | (?P<value>{_DECIMAL}) )"""

# Words that make another number of the one before them.
_SCALES = (
    "(?:hundred|thousand|million|billion|trillion|quadrillion|dozen|lakh|crore)s?|"
    "bn|mn|tn|mil|mln|grand|googol|pi|squared|cubed|factorial"
)
_FRACTIONS = (
    "halve|half|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|"
    "twelfth|(?:thir|four|fif|six|seven|eigh|nine)teenth|"
    "(?:twent|thirt|fort|fift|sixt|sevent|eight|ninet)ieth|"
    "(?:hundred|thousand|million|billion|trillion)th"
)
_FACTORS = (
    rf"{_SCALES}|(?:{_FRACTIONS})s?|plus|minus|times|over|by|or|and|to|mod|modulo|sqrt|"
    r"log|ln|sin|cos|tan|less|more|base"
)
_WORD = rf"(?!(?:{_FACTORS})\b)[A-Za-z]+"
_POWER = r"(?:\^\{?[23]\}?)?"
# Of units written right behind the digits only the well-known ones: `5xy` is a product. So it is
# with two letters after a space, where `2 xy` is one and `5 th` no number.
_GLUED = r"(?:mm|cm|km|kg|mg|ml|mph|ft|in|lbs?|oz|min|hrs?|am|pm)"
_SHORT = (
    "(?i:[kcdm]?m|[km]?g|[mcdk]l|mph|ft|in|mi|yd|ha|sq|lb|oz|[hy]r|wk|mo|ms|pt|qt|cc|gm|am|pm"
    "|[kmg]?hz|[kmgt]b|[km]w)"
)
_SPACED = rf"(?:{_SHORT}\b|(?![u-zU-Z]+\b)(?=[A-Za-z]{{3}}){_WORD})"
_UNIT = rf"""(?:
    \s*\\?%
  | \s*(?:\^\s*\{{?\s*\\circ\s*\}}?|\\degree|°) \s*(?:\\(?:text|mathrm)\s*\{{\s*)?[CFK]?\}}?
  | {_GLUED}\b{_POWER}
  | \s*\\(?:text|mathrm|mbox)\s*\{{\s*{_WORD}(?:[ /.-]+{_WORD})*(?<!\bper)\.?\s*\}}{_POWER}
  | \s+(?=[A-Za-z]{{2}}){_SPACED}(?:[ /-]{_WORD})*(?<!\bper){_POWER} )"""
_PLAIN_NUMBER = re.compile(rf"{_NUMBER}{_UNIT}?\s*\.?", re.VERBOSE)
_NUMBER_IN_TEXT = re.compile(_NUMBER, re.VERBOSE)
# As one character: all of Unicode's but zero thirds.
_FRACTION_CHARACTER = re.compile(r"(\d?)\s*([\u00bc-\u00be\u2150-\u215e])")
_COMMAS = re.compile(r"(?<![\d.,])\d+(?:,\d+)+(?!\d)")
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+")
_SPACED_GROUPS = re.compile(r"(?<![\d.,/])\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?![\d/])")

# What makes the number beside it part of an expression. Left: an operand and its operator, a ratio,
# a power, an index or an argument; right: an operator, a letter, a command or a word that changes
# it. Quarters may be coins.
_OPERATORS = "times|cdot|div|pm|mp|log|ln|sin|cos|tan|pi"
_IN_WORDS = r"(?:times|plus|minus|over|(?:divided|multiplied)\s+by)"
_COMMANDS = rf"{_OPERATORS}|sqrt|[dt]?frac|binom|[pb]?mod"
_PART_OF_LEFT = re.compile(
    rf"""(?: [-+\w.^_/!√×÷·] | [\w)\]}}!%]\s*[-+*/×÷·]\s* | [±∓]\s* | \d: | \d\s+:\s+ | [\^_]\s*\{{?
      | \\(?!boxed|text|math|mbox)[a-zA-Z]+\s*(?:\[[^\]]*\])?\{{ | \}}\{{
      | (?:sqrt|log|ln|sin|cos|tan|\bmod|\bmodulo)\s*\(? | \\(?:{_OPERATORS})\s*\{{?
      | [\d)\]}}]\s+(?:[xX]\s*|{_IN_WORDS}\s+) | [\w.]\([^()\n]* )$""",
    re.VERBOSE,
)
_PART_OF_RIGHT = re.compile(
    rf"""(?!{_GLUED}\b)\w | \.\(?\d | \.?\\(?:overline|bar|dot)\b | \s*(?:_|\^(?!\s*\{{?\s*\\circ))
      | !(?=\w|\s*[-+*/^=(]) | :\d | \s+:\s+\d
      | \s*[-+*/×÷·±∓]\s*(?:[\d(\\.]|[b-zB-HJ-Z]\b) | \s*\\(?:{_COMMANDS})(?![a-zA-Z]) | \s*√ | \(
      | \s+(?:[xyzXYZ]|[u-zU-Z]{{2,}}|st|nd|rd|th)\b | \s+i(?=\s*(?:$|[^\w\s]))
      | \s+{_IN_WORDS}\s+[\d(\\.] | \s*\(?\s*mod(?:ulo)?\b
      | \s+(?:[a-z]+-)?(?: (?:{_SCALES})\b | quarters?\s+of\b
          | (?!quarter)(?:{_FRACTIONS})(?: s\b | \s+of\b | \W*$ ) )""",
    re.VERBOSE,
)

_ANSWER = re.compile(r"\banswer\b(?:\s+is)?\s*[:=]?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?![-+*/=])|\n")
_EQUALS = re.compile(r"=|\\approx|≈")


def parse_number(text: str) -> float | None:
    """The number that a text is, from end to end, such as `-3/4`, `$1,234.50`, `12 apples` or `50%`
    (50); None for any other text."""
    found = _PLAIN_NUMBER.fullmatch(_plain(text).strip())
    return _value(found) if found else None


def extract_number(text: str) -> float | None:
    """The answer in a model's text: the last \\boxed, else what follows the last "answer is",
    else the
    last plain number.

    None where the answer that is given has digits and yet is no plain number, such as `2^{10}`.
    """
    text = _plain(text)
    boxed = _last_boxed(text)
    if boxed is not None and re.search(r"\d", boxed):
        numbers = _plain_numbers(_EQUALS.split(boxed)[-1])
        return numbers[0] if len(numbers) == 1 else None
    stated = [
        part for part in _SENTENCE_END.split(_ANSWER.split(text)[-1]) if re.search(r"\d", part)
    ]
    if _ANSWER.search(text) and stated:
        return next(iter(_plain_numbers(stated[0])), None)
    return next(reversed(_plain_numbers(text)), None)


def _plain(text: str) -> str:
    """Text without marks of formulas, emphasis and dollars, and with one kind of minus and of
    power.
    """
    text = re.sub(r"(?<=\d)\s*\*\*\s*(?=\d)", "^", text)
    # At the end of a formula an exclamation mark is a factorial, at the end of a sentence it is
    # none.
    text = re.sub(r"(?<!\\)!(?=\s*(?:\$|\}|\\\)|\\\]))", "^", text)
    text = _FRACTION_CHARACTER.sub(_written_out, text)
    text = text.replace("{,}", ",").replace("\u2212", "-").replace("\u2013", "-")
    for mark in (
        "**",
        "\\$",
        "$",
        "\\!",
        "\\,",
        "\\(",
        "\\)",
        "\\[",
        "\\]",
        "\\left",
        "\\right",
        "\\displaystyle",
    ):
        text = text.replace(mark, "")
    # One word, so that no part of it is a number. Short digits alone between commas are a list.
    text = _COMMAS.sub(_one_word_unless_grouped, text)
    return _SPACED_GROUPS.sub(lambda found: re.sub(r"\s", "_", found[0]), text)


def _one_word_unless_grouped(found: re.Match) -> str:
    listed = all(len(part) < 3 for part in found[0].split(",")[1:])
    return found[0] if listed or _THOUSANDS.fullmatch(found[0]) else found[0].replace(",", "_")


def _written_out(found: re.Match) -> str:
    """`2½` as `2 1/2`."""
    fraction = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {fraction}" if found[1] else fraction


def _last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces in it balanced."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def _plain_numbers(text: str) -> list[float]:
    """The plain numbers in a text, in their order. Digits inside a word, such as `v2`, are none."""
    found = []
    for match in _NUMBER_IN_TEXT.finditer(text):
        before = text[max(0, match.start() - 24) : match.start()]
        after = text[match.end() : match.end() + 24]
        value = _value(match)
        if (
            value is not None
            and not _PART_OF_LEFT.search(before)
            and not _PART_OF_RIGHT.match(after)
        ):
            found.append(value)
    return found


def _value(match: re.Match) -> float | None:
    """What a match of _NUMBER is worth; None for a division by zero, or a mixed fraction whose
    fraction is not between 0 and 1."""
    part = {
        name: float(text.replace(",", ""))
        for name, text in match.groupdict().items()
        if text and name != "sign"
    }
    if "value" in part:
        value = part["value"]
    else:
        top, bottom = (
            part[name]
            for name in ("top", "latex_top", "digit_top", "bottom", "latex_bottom", "digit_bottom")
            if name in part
        )
        if bottom == 0 or ("whole" in part and not 0 < top < bottom):
            return None
        value = part.get("whole", 0.0) + top / bottom
    value = -value if match["sign"] == "-" else value
    return value if np.isfinite(value) else None
