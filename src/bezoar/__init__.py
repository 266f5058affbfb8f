"""bezoar finds, removes and prevents backdoors in neural networks.

    import bezoar

    result = bezoar.scan(model, "clean-images/")
    print(result.verdict, result.target)

Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

from bezoar.version import __version__

if TYPE_CHECKING:
    from bezoar.api import Result, purify, scan
    from bezoar.core.errors import BezoarError
    from bezoar.core.results import Report

__all__ = ["BezoarError", "Report", "Result", "__version__", "purify", "scan"]

_HOME = {
    "BezoarError": "bezoar.core.errors",
    "Report": "bezoar.core.results",
    "Result": "bezoar.api",
    "purify": "bezoar.api",
    "scan": "bezoar.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bezoar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
