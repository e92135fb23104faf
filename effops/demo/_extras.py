"""The packages of the extra ``effops[demo]``: imported where they are used, checked at the start."""

from importlib.util import find_spec


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the text says how to install it."""


def require(*modules: str) -> None:
    """Raises MissingExtraError unless all modules can be imported."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f'effops demo: {", ".join(missing)} not installed; run: pip install "effops[demo]"'
        )
