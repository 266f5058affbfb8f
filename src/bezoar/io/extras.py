"""Optional libraries: imported where they are needed, with a clear answer where they are missing or broken."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from bezoar.core.errors import MissingExtra


def require(module: str, extra: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: Such as ``timm``.
        extra: The extra of this package that brings it, such as ``hf``.

    Raises:
        MissingExtra: It is not installed, or its import fails. A torchvision wheel built for CUDA beside a CPU-only
            torch raises RuntimeError rather than ImportError, so any exception counts.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingExtra(f"{missing} is not installed", f"Run: pip install 'bezoar[{extra}]'") from None
    except Exception as error:
        reason = one_line(error)
        raise MissingExtra(f"{module} is installed but cannot be imported ({reason})", _repair(reason, extra)) from None


def _repair(reason: str, extra: str) -> str:
    if "torchvision::" in reason:
        return (
            "torchvision and torch come from different builds (one for CUDA, one for the CPU). "
            "Install both from the same index: pip install --force-reinstall torch torchvision"
        )
    return f"Run: pip install --force-reinstall 'bezoar[{extra}]'"


def printable(text: str) -> str:
    """``text`` without line breaks and control characters: names in a stranger's file reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """First line of an exception's message, or its class where it has none, cut to ``limit`` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(lines[0] if lines else type(error).__name__)
    return text.rstrip(".:") if len(text) <= limit else text[: limit - 3] + "..."
