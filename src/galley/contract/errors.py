"""The one error that is the user's to fix. Part of the contract; the standard library only."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can fix: one line ``where: what; what to do``, exit status 2, no traceback."""

    def __init__(self, where: str, what: str, todo: str) -> None:
        super().__init__(f"{where}: {what}; {todo}")
        self.where, self.what, self.todo = where, what, todo

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        # Exceptions are rebuilt from their message alone otherwise, as they come back from another process.
        return type(self), (self.where, self.what, self.todo)
