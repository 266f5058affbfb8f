"""The ground truth of a victim on disk, for whoever measures a defence."""

from bezoar.attacks._attack import GroundTruth, Plant
from bezoar.attacks._labels import LabelMap
from bezoar.attacks._store import load_truth, save_truth

__all__ = ["GroundTruth", "LabelMap", "Plant", "load_truth", "save_truth"]
