"""The one error that is the user's to fix. Part of the contract; the standard library only."""


class UserError(Exception):
    """A mistake that the user can fix: one line ``where: what; what to do``, exit status 2, no traceback."""

    def __init__(self, where: str, what: str, todo: str) -> None:
        super().__init__(f"{where}: {what}; {todo}")
        self.where, self.what, self.todo = where, what, todo
