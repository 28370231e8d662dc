"""A command of many parts of which some failed: what the others found is printed all the same."""

from jmp_lite.errors import JmpLiteError


class PartlyFailedError(JmpLiteError):
    """Ends the program with status 2, after a text.

    Attributes:
        text: What was found, for standard output; the message is for standard error.
    """

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text
