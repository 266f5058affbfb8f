"""Grids: what they say, what is refused before anything is trained, and what a cell's key depends on."""

from __future__ import annotations

import pytest

from bezoar.bench.grid import read_grid
from bezoar.core.errors import BezoarError, DataError, SettingError

HEAD = '[grid]\ndata = "d.npz"\narchs = ["convnet-8"]\n'
VICTIM = '[[victim]]\nattack = "badnets"\n'
PURIFIER = '[[purifier]]\nmethod = "finetune"\n'


def grid(tmp_path, text=HEAD + VICTIM + PURIFIER):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return read_grid(path)


def test_cells_are_the_product(tmp_path):
    text = HEAD.replace('"convnet-8"', '"convnet-8", "convnet-16"') + "images = [100, 10]\nseeds = [0, 1, 2]\n"
    text += VICTIM + '[[victim]]\nattack = "none"\n' + PURIFIER + '[[purifier]]\nmethod = "unlearn"\n'
    read = grid(tmp_path, text)
    cells = list(read.cells())
    assert len(cells) == 4 * 2 * 3 * 2
    assert len({read.key(cell, {}) for cell in cells}) == len(cells)
    assert {v.name for v in read.victims} == {
        *("badnets_convnet-8_0", "badnets_convnet-16_0", "none_convnet-8_0", "none_convnet-16_0")
    }


def test_key_depends_on_what_decides_and_not_on_names(tmp_path):
    def key(text, versions=None):
        read = grid(tmp_path, text)
        return read.key(next(read.cells()), versions or {"bezoar": "1"})

    base = key(HEAD + VICTIM + PURIFIER)
    assert base == key(HEAD + VICTIM + 'name = "other"\n' + PURIFIER + 'name = "mine"\n')
    assert base == key(HEAD + VICTIM + PURIFIER + "settings = {lr = 0.01}\n"), "the default, written out"
    for changed in (
        HEAD + VICTIM + PURIFIER + "settings = {lr = 0.02}\n",
        HEAD + VICTIM + "settings = {rate = 0.2}\n" + PURIFIER,
        HEAD + VICTIM + "seed = 1\n" + PURIFIER,
        HEAD + "seeds = [4]\n" + VICTIM + PURIFIER,
        HEAD + "images = [20]\n" + VICTIM + PURIFIER,
        HEAD.replace("d.npz", "e.npz") + VICTIM + PURIFIER,
        HEAD + VICTIM + PURIFIER + "[recipe]\nepochs = 3\n",
    ):
        assert key(changed) != base
    assert key(HEAD + VICTIM + PURIFIER, {"bezoar": "2"}) != base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid", "not a grid"),
        (HEAD + PURIFIER, r"at least one \[\[victim\]\]"),
        (HEAD + VICTIM, r"at least one \[\[purifier\]\]"),
        ("[grid]\n" + VICTIM + PURIFIER, "needs data"),
        ('[grid]\ndata = "d"\n' + VICTIM + PURIFIER, "no architecture"),
        (HEAD + "image = [5]\n" + VICTIM + PURIFIER, "has no 'image'"),
        (HEAD + "images = [1]\n" + VICTIM + PURIFIER, "at least 2"),
        (HEAD + "images = 500\n" + VICTIM + PURIFIER, "list of whole numbers"),
        (HEAD + "seeds = [true]\n" + VICTIM + PURIFIER, "list of whole numbers"),
        (HEAD + VICTIM.replace("badnets", "badnet") + PURIFIER, "badnet"),
        (HEAD + VICTIM + "settings = {rat = 0.1}\n" + PURIFIER, "no setting 'rat'"),
        (HEAD + VICTIM + "settings = {rate = 2.0}\n" + PURIFIER, "rate must be"),
        (HEAD + VICTIM + PURIFIER.replace("finetune", "finetun"), "finetun"),
        (HEAD + VICTIM + PURIFIER + "settings = {lr = 'much'}\n", "expected a float"),
        (HEAD + VICTIM + PURIFIER + "oracle = {rate = [1]}\n", "no setting 'rate'"),
        (HEAD + VICTIM + PURIFIER + "oracle = {lr = ['a']}\n", "expected a float"),
        (HEAD + VICTIM + PURIFIER + "oracle = {lr = []}\n", "oracle names one setting"),
        (HEAD + VICTIM + PURIFIER + "[scan]\nseeds = 'a'\n", "expected an int"),
        (HEAD + VICTIM + PURIFIER + "[scan]\nseeds = 0\n", "at least 1"),
        (HEAD + VICTIM + PURIFIER + "[recipe]\nepochs = 'a'\n", "expected an int"),
        (HEAD.replace("convnet-8", "convnt-8") + VICTIM + PURIFIER, "convnt-8"),
        (HEAD + '[[victim]]\nfolder = "nowhere"\n' + PURIFIER, "holds no victim"),
        (HEAD + VICTIM + PURIFIER + PURIFIER, "two purifiers are called"),
        (HEAD + VICTIM + VICTIM + PURIFIER, "two victims are called"),
        (HEAD + VICTIM + PURIFIER + "[recipe]\nepoch = 3\n", "no setting 'epoch'"),
        (HEAD + VICTIM + PURIFIER + "[recipe]\nepochs = 0\n", "at least 1"),
        (HEAD + VICTIM + PURIFIER + "[scan]\nseed = 1\n", "has no 'seed'"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(tmp_path, text, message):
    with pytest.raises(BezoarError, match=message):
        grid(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="not a grid"):
        read_grid(tmp_path / "no.toml")


def test_oracle_is_named_as_such_and_has_a_candidate_for_each_value(tmp_path):
    text = HEAD + VICTIM + PURIFIER + "oracle = {lr = [0.01, 0.02]}\n"
    spec = grid(tmp_path, text).purifiers[0]
    assert "oracle" in spec.name
    assert [p.lr for p in spec.candidates()] == [0.01, 0.02]


def test_example_of_the_repository_is_read():
    from pathlib import Path

    read = read_grid(Path(__file__).parents[2] / "examples" / "grid.toml")
    assert {v.attack for v in read.victims} == {"badnets", "blend", "none"}
    with pytest.raises(SettingError):
        read.purifiers[0].purifier.require("lr", False, "small")
