"""The one exception that stands for a mistake or a limit of the user's side, and how it quotes
another library's.
"""


class UserError(Exception):
    """Something the user can put right. Its message is one line: what is wrong, then the way out.

    `common.cli.run` prints it without a traceback and ends the process with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """Of another library's error: at most 200 characters, its kind where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
