"""The errors that a user may see, and the exit code of each.

    SeCompressError
    ├── RecipeError         2   the command line, the recipe or a hand-edited plan cannot be used
    ├── SourceError         3   the model or the data cannot be read, or is not what it claims to be
    ├── ValidationFailed    4   a gate failed; nothing was published
    └── ResourceError       5   not enough memory or disk

Each message is one line: the value, where it stands, what would be accepted. However long what it
quotes is, it stays short, and nothing in it steers a terminal. Anything that is not a
`SeCompressError` is a bug in this tool and shows its traceback.
"""

MESSAGE_LENGTH = 480
VALUE_LENGTH = 80


class SeCompressError(Exception):
    """Base of every error that is shown to the user as one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(shorten(printable(" ".join(message.split())), MESSAGE_LENGTH))


def shorten(text: str, length: int) -> str:
    """At most `length` characters; what is left out is in the middle, as the end tells what to do.

    `length` is at least 20.
    """
    if len(text) <= length:
        return text
    head = (length - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (length - 5 - head) :]}"


def printable(text: str) -> str:
    """Control characters, half surrogates and marks that turn the direction of text, as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(value: object) -> str:
    """A value as a message quotes it."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python prints no 5,000 digits
        return f"an integer of {value.bit_length()} bits"
    return shorten(repr(value), VALUE_LENGTH)


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
# Of `python -m se_compress.reload`: this machine cannot load the result, which says nothing of it;
# another time it may, or nothing here ever will.
NOT_RUN_EXIT_CODE = 77
CANNOT_RUN_EXIT_CODE = 78


def one_line(error: object, width: int = 200) -> str:
    """What a library or a file says, in one line without control characters. Of a long text the
    first and the last part are kept: the one says what it is about, the other often what to do."""
    printable = "".join(c if c.isprintable() else " " for c in str(error))
    text = " ".join(printable.split()) or type(error).__name__
    if len(text) <= width:
        return text
    half = (width - 5) // 2
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"
