"""How an error of a library becomes part of one of ours. On the ground, so that every room above can use it."""

__all__ = ["first_line"]

_LIMIT = 240  # characters: torch's messages may go on for pages, and not all of them break lines


def first_line(error: BaseException) -> str:
    """The gist of a long message: its first line, cut where it gets too long; the type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:_LIMIT]
