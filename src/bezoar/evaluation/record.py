"""What planting a backdoor gave: a dataclass that goes to JSON and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bezoar.core.document import Document
from bezoar.core.results import DataFacts, RunFacts
from bezoar.evaluation.measures import Measures
from bezoar.evaluation.stealth import Stealth

SCHEMA = "bezoar.attack/1"


@dataclass(frozen=True, kw_only=True)
class PlantFacts:
    """One planted trigger; its measures stand at the same place in ``measures.plants``.

    Attributes:
        name: Of the plant.
        trigger: Class of the trigger.
        label_map: ``all-to-one`` or ``all-to-all``.
        target: Wanted label of ``all-to-one``; null of ``all-to-all``.
        sources: Classes that the trigger shall work on; empty for all.
        stealth: Measured on test images that the trigger shall work on; null where kornia is missing or there are none.
    """

    name: str
    trigger: str
    label_map: str
    target: int | None
    sources: tuple[int, ...]
    stealth: Stealth | None


@dataclass(frozen=True, kw_only=True)
class Record(Document):
    """A victim in full.

    Attributes:
        attack, config: Registry name of the attack and its settings.
        arch: Architecture, as the user wrote it.
        parameters: Number of parameters.
        recipe: Settings of the training.
        seed: Of first weights, order of the examples and augmentation.
        shape: Channels, height and width of the images.
        train, test: The data; hashes are those of the clean images.
        poisoned, cover: Numbers of training examples in ``index.json``.
        afresh: Whether training poisoned every batch anew; ``index.json`` then holds one draw of the same shares.
        plants: The planted triggers, the main one first.
        measures: Of the victim, on the test images.
        figures: What the attack measured of itself by name, such as the share of hidden bits that can be read.
        clean_twin: The same of a net that was trained on clean data the same way: its ASR is what the trigger does to a
            net without a backdoor. Null where none was asked for.
        files: SHA-256 of each file beside this one; empty for folders.
        warnings: What the user should know.
        key: Hash over all that decides the outcome: the same command gives the same.
        run: All that differs from run to run.
    """

    NAMED: ClassVar[str] = SCHEMA
    WHAT: ClassVar[str] = "a record of bezoar attack"
    WHENCE: ClassVar[str] = "Run bezoar attack again"

    attack: str
    config: dict[str, Any]
    arch: str
    parameters: int
    recipe: dict[str, Any]
    seed: int
    shape: tuple[int, ...]
    train: DataFacts
    test: DataFacts
    poisoned: int
    cover: int
    plants: tuple[PlantFacts, ...]
    measures: Measures
    afresh: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    clean_twin: Measures | None
    files: dict[str, str]
    warnings: tuple[str, ...]
    key: str
    run: RunFacts
    schema: str = field(default=SCHEMA)
