"""bezoar finds, removes and prevents backdoors in neural networks.

    import bezoar

    result = bezoar.scan(model, "clean-images/")
    print(result.verdict, result.target)

Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

from bezoar.version import __version__

if TYPE_CHECKING:
    from bezoar.apart import Limits
    from bezoar.api import Result, purify, scan
    from bezoar.core.errors import BezoarError
    from bezoar.core.results import Report
    from bezoar.filtering import Filtered, filter_data
    from bezoar.guarding import Guarded, guard, load_guard
    from bezoar.sweeping import Sweep, sweep
    from bezoar.training import TrainResult, train

__all__ = [
    "BezoarError",
    "Filtered",
    "Guarded",
    "Limits",
    "Report",
    "Result",
    "Sweep",
    "TrainResult",
    "__version__",
    "filter_data",
    "guard",
    "load_guard",
    "purify",
    "scan",
    "sweep",
    "train",
]

_HOME = {
    "BezoarError": "bezoar.core.errors",
    "Filtered": "bezoar.filtering",
    "Guarded": "bezoar.guarding",
    "Limits": "bezoar.apart",
    "Report": "bezoar.core.results",
    "Result": "bezoar.api",
    "Sweep": "bezoar.sweeping",
    "TrainResult": "bezoar.training",
    "filter_data": "bezoar.filtering",
    "guard": "bezoar.guarding",
    "load_guard": "bezoar.guarding",
    "purify": "bezoar.api",
    "scan": "bezoar.api",
    "sweep": "bezoar.sweeping",
    "train": "bezoar.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bezoar' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
