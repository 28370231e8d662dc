"""How a command ends that printed something: with status 0, or with another one and a reason."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command that ran to its end has to say.

    Attributes:
        text: For standard output.
        status: 0, or 1 if a check found something, or 2 if a part of the command failed.
        complaint: For standard error, if any; one line.
    """

    text: str
    status: int = 0
    complaint: str = ""
