"""A row that cannot be used, with the reason in words for the report."""


class BadRow(ValueError):
    """`str(error)` completes the sentence "row N: ..."."""
