"""One measurement of a benchmark: a purifier on a victim."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["done", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell gave; rates in [0, 1], on test images that no purifier saw.

    Attributes:
        key: Hash of its configuration.
        victim, attack, arch, data: What was purified; ``attack`` is ``none`` for a clean net.
        purifier, method, config: What purified it: name in the grid, registry name, settings.
        oracle: Whether a setting was chosen with the ground truth.
        images: Clean images that the defender had.
        seed: Of their draw and of the purifier.
        status: ``done``; ``refused``, where the purifier found nothing to do and the model stayed as it was;
            ``failed``.
        error: Why, where it is not ``done``.
        acc_before, acc_after: ACC.
        asr_before, asr_after: ASR, of the trigger that works best; None for a clean net.
        ra_before, ra_after: RA of the trigger where it is lowest.
        der: DER; None for a clean net.
        seconds, cpu_seconds: Of the purifier, without the scan.
        scan_seconds: Of the scan, where one was needed; shared by all purifiers that need it.
        image_gradients: Images that the model saw with gradients switched on.
        notes: What the purifier found out.
        warnings: What it warned of.
    """

    key: str
    victim: str
    attack: str
    arch: str
    data: str
    purifier: str
    method: str
    config: dict[str, Any]
    oracle: bool
    images: int
    seed: int
    status: Status
    error: str = ""
    acc_before: float | None = None
    acc_after: float | None = None
    asr_before: float | None = None
    asr_after: float | None = None
    ra_before: float | None = None
    ra_after: float | None = None
    der: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    scan_seconds: float | None = None
    image_gradients: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
