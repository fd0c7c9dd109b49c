"""Plot where drawn and real objects are, how large and how turned: python docs/pictures/layout.py DATA [MODEL].

DATA is what `condgan prepare` wrote. Writes layout.png beside this script; needs matplotlib (the dev extra).
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from condgan import IterativeGenerator
from condgan.layout import Comparison, Layout, compare_layouts
from condgan.measures import scene_layout
from condgan.scenes import SceneDrawer, as_real, read_real

BINS = {"area": 25, "width": 20, "height": 25, "overlap": 20, "visible": 20, "rotation": 18}
NAMES = ("drawn", "real, test split", "real, validation split")


def values(layout: Layout, field: str) -> Tensor:
    """All values of a statistic, of later turns where first turns are tested apart."""
    x = getattr(layout, field)
    x = x if field == "rotation" else x[:, 1:] if field != "visible" else x[:, :-1]
    return x[~x.isnan()]


def title(field: str, found: dict[str, Comparison]) -> str:
    """What the two-sample test of a statistic says."""
    name = field if field in found else f"{field}_later"
    test = found[name]
    return f"{name.replace('_', ' ')}: {test.distance:.3f}, floor {test.floor:.3f}, p {test.p_value:.3f}"


generator = IterativeGenerator.from_pretrained(sys.argv[2] if len(sys.argv) > 2 else None)
real = read_real(sys.argv[1], generator, generator.vocabulary)
drawer = SceneDrawer(generator, generator.vocabulary, 1, "picture", 64, True)
drawn, _ = drawer.draw(real.lists, range(len(real.lists)))
layouts = [
    scene_layout(scenes, generator.vocabulary) for scenes in (as_real(drawn, generator), real.test, real.validation)
]
found = compare_layouts(*layouts, rng_seed=0)

figure, axes = plt.subplots(3, 3, figsize=(15, 12), layout="constrained")
for axis, layout, name in zip(axes[0], layouts, NAMES, strict=True):
    places = layout.place.flatten(0, 1)
    axis.scatter(places[:, 0], places[:, 1], s=4, alpha=0.5)
    axis.set(title=f"places, {name}", xlim=(0, 63), ylim=(63, 0), aspect="equal")
for axis, (field, bins) in zip(axes[1:].flat, BINS.items(), strict=True):
    samples = [values(layout, field).tolist() for layout in layouts]
    axis.hist(samples, bins=bins, density=True, label=NAMES)
    axis.set(title=title(field, found), yscale="log" if field in ("overlap", "visible") else "linear")
axes[1, 0].legend()
figure.savefig(Path(__file__).with_name("layout.png"), dpi=70)
