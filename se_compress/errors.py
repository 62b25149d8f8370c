"""The errors that a user may see, and the exit code of each.

    SeCompressError
    ├── RecipeError         2   the command line, the recipe or a hand-edited plan cannot be used
    ├── SourceError         3   the model or the data cannot be read, or is not what it claims to be
    ├── ValidationFailed    4   a gate failed; nothing was published
    └── ResourceError       5   not enough memory or disk

Each message is one line: the value, where it stands, what would be accepted. Anything that is not a
`SeCompressError` is a bug in this tool and shows its traceback.
"""


class SeCompressError(Exception):
    """Base of every error that is shown to the user as one line."""

    exit_code = 1


class RecipeError(SeCompressError):
    """The command line, the recipe or a plan asks for something impossible or unknown."""

    exit_code = 2


class SourceError(SeCompressError):
    """The model or the data cannot be read, or is not what it claims to be."""

    exit_code = 3


class ValidationFailed(SeCompressError):
    """The staged checkpoint did not pass its gates; it is kept apart and not published."""

    exit_code = 4


class ResourceError(SeCompressError):
    """Memory or disk does not suffice."""

    exit_code = 5


# Of a run that a signal ended, with its progress kept: this and the signal's number. 130 after
# Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
SIGNAL_EXIT_CODE = 128
INTERRUPTED_EXIT_CODE = 130
# Of `python -m se_compress.reload`: this machine cannot load the result, which says nothing of it.
NOT_RUN_EXIT_CODE = 77
