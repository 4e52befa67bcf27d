"""The one exception that stands for a mistake or a limit of the user's side."""


class UserError(Exception):
    """Something the user can put right. Its message is one line: what is wrong, then the way out.

    `common.cli.run` prints it without a traceback and ends the process with exit code 2.
    """
