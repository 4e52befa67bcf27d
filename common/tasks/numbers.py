r"""Numbers in text: what an expected answer is worth, and which number a model's text gives as
its answer.

A plain number stands for itself: `-7`, `1,234.50`, `3/4`, `\frac{3}{4}`, `3\frac{1}{2}` (3.5),
`1e3`, with a unit or without. Its sign may stand apart (`- 5`) or be a word (`minus 5`).
Expressions (`2^{10}`, `5x`, `12!`, `\sqrt{2}`), ratios, lists and ranges are none, and no part of
them is. Nor are recurring decimals (`0.(3)`, `0.\overline{3}`), digits in groups with a space
between (`12 000`), which may be one number or two, and digits that commas group otherwise than by
thousands (`1,2345`, `0,125`).
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
_NUMBER = rf"""(?P<sign>[-+]?)(?:[€£¥]\s*)?(?:
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
    r"log|ln|sin|cos|tan|less|more|base|st|nd|rd|th"
)
_WORD = rf"(?!(?:{_FACTORS})\b)[A-Za-z]+"
_POWER = r"(?:\^\{?[23]\}?|[²³])?"
# Not \b, which is not between `cm` and `³`.
_END = "(?![A-Za-z0-9_])"
# Of units written right behind the digits only the well-known ones: `5xy` is a product. So it is
# with two letters after a space, where `2 xy` is one and `5 th` no number.
_GLUED = rf"(?:mm|cm|km|kg|mg|ml|mph|ft|in|lbs?|oz|min|hrs?|am|pm){_END}"
_SHORT = (
    "(?i:[kcdm]?m|[km]?g|[mcdk]l|mph|ft|in|mi|yd|ha|sq|lb|oz|[hy]r|wk|mo|ms|pt|qt|cc|gm|am|pm"
    "|[kmg]?hz|[kmgt]b|[km]w)"
)
_SPACED = rf"(?:{_SHORT}{_END}|(?![u-zU-Z]+\b)(?=[A-Za-z]{{3}}){_WORD})"
_UNIT = rf"""(?:
    \s*(?:\\?%|[€£¥¢])
  | \s*(?:\^\s*\{{?\s*\\circ\s*\}}?|\\degree|°) \s*(?:\\(?:text|mathrm)\s*\{{\s*)?[CFK]?\}}?
  | {_GLUED}{_POWER}
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
_FUNCTIONS = "sqrt|log|ln|sin|cos|tan"
_IN_WORDS = r"(?:times|plus|minus|over|(?:divided|multiplied)\s+by)"
# Every LaTeX command but those that only show, space or compare and units: `\lfloor`, `\pmod`,
# `\infty`.
_COMMAND = r"""\\(?!(?:boxed|text[a-z]*|math[a-z]*|[mh]box|emph|underline|rm|bf
    |[lL]arge|LARGE|huge|begin|end|item|circ|degree|mu|Omega|[lc]?dots
    |approx|sim|[lg]eq?|[lg]t|therefore|implies|[Rr]ightarrow|square|blacksquare|checkmark)
    (?![a-zA-Z]))[a-zA-Z]+"""
_INDEX = r"(?:\s*[_^]\s*(?:\w|\{[^{}]*\}))"
# Between a number and its word: `5 million`, `5\text{ million}`.
_GAP = r"(?:\s+|\s*\\(?:text|mathrm|mbox)\s*\{\s*)"
_PART_OF_LEFT = re.compile(
    rf"""(?: [-+\w.^_/!√×÷·] | [\w)\]}}!%]\s*[-+*/×÷·]\s* | [±∓]\s* | \d: | \d\s+:\s+ | [\^_]\s*\{{?
      | {_COMMAND}{_INDEX}*\s*(?:\[[^\]]*\])?\s*(?:\\?\{{|[(\[|])?\s* | \}}\{{ | [)\]]\(
      | [-+]\s*(?:\\[a-z]+\s*)?[({{\[|]\s*
      | (?:{_FUNCTIONS}|\bmod|\bmodulo)(?:{_INDEX}\s)?\s*\(?
      | [\d)\]}}]\s+(?:[xX]\s*|{_IN_WORDS}\s+) | [\w.]\([^()\n]* )$""",
    re.VERBOSE,
)
# Left of a number with a sign, which then is no sign: `3 -5`, `(3)-5`, `x -5`.
_OPERAND = re.compile(r"(?:\d%?\s*|[)\]]|(?<!:)\}|(?<![A-Za-z'])[b-hj-z]\s+)$")
_PART_OF_RIGHT = re.compile(
    rf"""(?!{_GLUED})\w | \.\(?\d | \.?\\(?:overline|bar|dot)\b | \s*(?:_|\^(?!\s*\{{?\s*\\circ))
      | !(?=\w|\s*[-+*/^=(]) | :\d | \s+:\s+\d
      | \s*[-+*/×÷·±∓]\s*[-+]?(?:[\d(\\.]|[b-zB-HJ-Z]\b) | \s*{_COMMAND} | \s*√ | \(
      | [)\]](?:\(|\s*[-+*/^×÷·]\s*[\d(\\.])
      | \s*\}}\s*(?:[_{{]|\^(?!\s*\{{?\s*\\circ))
      | {_GAP}(?:[u-zU-Z]{{2,}}|st|nd|rd|th)\b | \s+[xyzXYZ]\b | \s+i(?=\s*(?:$|[^\w\s]))
      | {_GAP}{_IN_WORDS}[\s}}]+[-+]?[\d(\\.] | \s*\(?\s*mod(?:ulo)?\b
      | {_GAP}(?:[a-z]+-)?(?: (?:{_SCALES})\b | quarters?\s+of\b
          | (?!quarter)(?:{_FRACTIONS})(?: s\b | \s+of\b | \W*$ ) )""",
    re.VERBOSE,
)

# What makes the number beside it one of several in an answer. Right: a comma, a row's or column's
# end of a matrix or a word, then another number or equation; `5, 3 of which are red` is one answer.
# Units in between: one or two words before `and` or `or`, and those of which a smaller one follows
# (`5 feet 3 inches`).
_ANOTHER = rf"[-+({{\[$]*\s*(?:[\d.]|{_COMMAND}|\\[dt]?frac)"
_SAID_OF_IT = r"(?!\S+\s+(?:of|more|less|fewer|is|are|was|were)\b)"
_UP_TO_TWO_WORDS = rf"(?:\s*(?:\\?%|°|[€£¥¢])|{_GAP}[A-Za-z]+(?:[ -][A-Za-z]+)?\s*\}}?)?"
_LARGER_UNIT = (
    "(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|miles?|yards?|feet|foot|ft|"
    "pounds?|lbs?|gallons?|quarts?|dollars?|degrees?|km|kg|m)"
)
_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_LISTED_RIGHT = re.compile(
    rf"""\s*(?:[,;]\s*(?:(?:and|or)\s+)?{_SAID_OF_IT}|&|\\\\)\s*{_ANOTHER}
      | \s*(?:[,;]|\\\\|\b(?:and|or)\b)\s*[A-Za-z](?:_\w+)?\s*=
      | \s*,\s*[A-Za-z]\s*[)\]}}\\]
      | {_UP_TO_TWO_WORDS}{_GAP}(?:and|or)[\s}}]+{_ANOTHER}
      | {_UP_TO_TWO_WORDS}\s+and\s+an?\s+(?:half|third|quarter|fourth|fifth)\b
      | (?:{_GAP}(?:to|through)|\s*\\?%?\s+of|\s+percent\s+of)[\s}}]+{_ANOTHER}
      | {_GAP}{_LARGER_UNIT}\b[\s}}]*,?\s+\d | \s+{_MONTH}\.?,?\s+\d{{4}}
      | \s*\|""",
    re.VERBOSE,
)
_LISTED_LEFT = re.compile(
    r"(?:(?:[\d)\]}]|\\infty)\s*(?:[,;&]|\\\\|\b(?:and|or|to)\b)|[(\[{]\s*[-+]?\w+\s*,|\|)\s*$"
)
# `x = 5, y = 6`: behind a digit or an equation another equation.
_SECOND_EQUATION = re.compile(
    r"[^=\d]*[=\d].*?(?:[,;]|\\\\|\b(?:and|or)\b\s*\}?)\s*[A-Za-z\\][^=(){},]*=", re.DOTALL
)

_ANSWER = re.compile(r"\banswer\b(?:\s+is)?\s*[:=]?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?![-+*/=])|\n")
_EQUALS = re.compile(r"=|\\approx|≈")
# A minus that stands apart is a sign at the start and behind what no operand ends with. Behind
# another word (`Answer - 5`) and at the start of a further line it is a dash.
_MINUS_APART = re.compile(
    r"""((?:\A | [=≈<>({\[,:|] | \\approx
      | \b(?:is|are|be|was|equals?|to|exactly|about|approximately|roughly))[^\S\n]*)
    (?:-|minus\b)[^\S\n]+(?=[€£¥]?\s*[\d.]|\\[dt]?frac|\\boxed)""",
    re.VERBOSE | re.IGNORECASE,
)
_NEGATIVE = re.compile(
    r"(?:\\text\s*\{\s*negative\s*\}\s*|\bnegative\s+)(?=[€£¥]?\s*[\d.]|\\[dt]?frac)", re.IGNORECASE
)
# `~`, `\;`, `\:`, `\ `, `\quad`, `\hspace{1mm}`, but no line's end `\\`.
_LATEX_SPACE = re.compile(r"~|(?<!\\)\\(?:[;: ]|q?quad(?![a-zA-Z])|hspace\*?\{[^{}]*\})")


def parse_number(text: str) -> float | None:
    """The number that a text is, from end to end, such as `-3/4`, `$1,234.50`, `12 apples` or `50%`
    (50); None for any other text."""
    found = _PLAIN_NUMBER.fullmatch(_plain(text).strip())
    return _value(found) if found else None


def extract_number(text: str) -> float | None:
    """The answer in a model's text: the last \\boxed, else what follows the last "answer is", else
    the last plain number.

    None where the answer that is given has digits and yet is no plain number, such as `2^{10}`.
    """
    text = _plain(text)
    boxed = _last_boxed(text)
    if boxed is not None and re.search(r"\d", boxed):
        part = "" if _SECOND_EQUATION.match(boxed) else _EQUALS.split(boxed)[-1]
        numbers = _plain_numbers(part)
        return _alone(numbers) if len(numbers) == 1 else None
    stated = [
        part for part in _SENTENCE_END.split(_ANSWER.split(text)[-1]) if re.search(r"\d", part)
    ]
    if _ANSWER.search(text) and stated:
        numbers = _plain_numbers(stated[0])
        return _alone(numbers) if numbers else None
    numbers = _plain_numbers(text)
    return _value(numbers[-1]) if numbers else None


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
    text = _LATEX_SPACE.sub(" ", text)
    # A formula on lines of its own starts with a sign, not with a dash.
    text = re.sub(r"(\\\[|\$\$)\s*-\s*", r"\1-", text)
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
    text = _MINUS_APART.sub(r"\1-", _NEGATIVE.sub("-", text.strip()))
    text = re.sub(r"(?<![\w)}\]])-\\boxed\{", r"\\boxed{-", text)
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


def _plain_numbers(text: str) -> list[re.Match]:
    """The plain numbers in a text, in their order. Digits inside a word, such as `v2`, are none."""
    return [match for match in _NUMBER_IN_TEXT.finditer(text) if _is_plain(match)]


def _is_plain(match: re.Match) -> bool:
    before, after = _around(match)
    return (
        _value(match) is not None
        and not _PART_OF_LEFT.search(before)
        and not (match["sign"] and _OPERAND.search(before))
        and not _PART_OF_RIGHT.match(after)
    )


def _alone(numbers: list[re.Match]) -> float | None:
    """What the first of some numbers is worth; None where it is one of several, as in `2, 3` and
    `5 or 6`. `1/2, or 0.5` is one, said twice."""
    first = numbers[0]
    for second in numbers[1:2]:
        between = first.string[first.end() : second.start()]
        if _value(first) == _value(second) and re.fullmatch(r",?\s+or\s+", between):
            return _value(first)
    before, after = _around(first, 48)
    return None if _LISTED_LEFT.search(before) or _LISTED_RIGHT.match(after) else _value(first)


def _around(match: re.Match, width: int = 24) -> tuple[str, str]:
    """The text on both sides of a match, as far as it says something about it."""
    start, end = match.span()
    return match.string[max(0, start - width) : start], match.string[end : end + width]


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
