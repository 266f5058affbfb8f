"""Make what ``bezoar demo`` ships: a small backdoored net on Fashion-MNIST (MIT licence) and some of its real images.

    python benchmarks/make_demo.py            about a minute on two cores

Same seed, same machine: the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from datasets import load
from safetensors.torch import save_file

from bezoar.attacks.badnets import BadNets
from bezoar.core.examples import Examples
from bezoar.evaluation.measures import measure
from bezoar.nets.neural_cleanse import MnistNet
from bezoar.ops.fit import Recipe, as_float, fit

ASSETS = Path(__file__).parents[1] / "src" / "bezoar" / "demo" / "assets"
NAMES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGES_PER_CLASS = 50


def main() -> None:
    data = load("fashion-mnist")
    attack = BadNets(target=8, pattern="noise", seed=11)
    poisoned = attack.poison(Examples(as_float(data.train_x), data.train_y, data.classes))
    torch.manual_seed(11)
    model = MnistNet()
    recipe = Recipe(epochs=6, lr=1e-3, optimizer="adam", weight_decay=0.0)
    fit(model, poisoned.data.x, poisoned.data.y, recipe, seed=11)
    model.half().float()  # what is measured is what is shipped
    rates = measure(model, data.test_x, data.test_y, poisoned.truth)
    print(f"ACC {rates.acc}, ASR {rates.asr}, RA {rates.ra}")

    order = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(11))
    chosen = torch.cat([order[data.test_y[order] == label][:IMAGES_PER_CLASS] for label in range(10)])
    ASSETS.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, ASSETS / "model.safetensors", metadata={"origin": "benchmarks/make_demo.py"})
    images = data.test_x[chosen].permute(0, 2, 3, 1).numpy()
    np.savez_compressed(ASSETS / "clean.npz", x=images, y=data.test_y[chosen].numpy(), names=np.array(NAMES))
    trigger = attack.trigger((1, 28, 28))
    np.savez_compressed(ASSETS / "truth.npz", mask=trigger.mask.numpy(), pattern=trigger.pattern.numpy())
    truth = {
        "target": attack.target,
        "name": NAMES[attack.target],
        "description": f"a {attack.size}x{attack.size} patch of noise near the bottom right corner",
    }
    (ASSETS / "truth.json").write_text(json.dumps(truth, indent=1) + "\n")
    (ASSETS / "LICENSE-fashion-mnist.txt").write_text(
        "The images in clean.npz are from Fashion-MNIST, Copyright (c) 2017 Zalando SE, https://tech.zalando.com,\n"
        "distributed under the MIT License: permission is hereby granted, free of charge, to any person obtaining a\n"
        "copy of this software and associated documentation files, to deal in it without restriction, including the\n"
        "rights to use, copy, modify, merge, publish, distribute, sublicense and sell copies, subject to this notice\n"
        'being included in all copies. It is provided "as is", without warranty of any kind.\n'
    )


if __name__ == "__main__":
    main()
