"""Version of the package, and of what a result depends on."""

from __future__ import annotations

import platform

__version__ = "0.1.0.dev0"


def versions() -> dict[str, str]:
    """Versions of bezoar, torch and Python, and the platform."""
    import torch

    return {
        "bezoar": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
