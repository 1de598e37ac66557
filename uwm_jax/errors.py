"""The one exception for what a person can mend: flags, configs, files, shapes.

`cli.run` prints its message alone and exits with status 2; anything else keeps its traceback.
"""


class UserError(Exception):
    """Says what is wrong, where, what was expected, what was found and what to do about it."""
