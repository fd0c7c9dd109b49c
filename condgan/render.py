"""Scenes in the look of i-CLEVR, rendered: names of objects and a seed in, a picture a turn out.

For who has no i-CLEVR at hand, or wants to know all of a scene. The scene is that of CLEVR (Johnson et al. 2017,
arXiv:1612.06890) with i-CLEVR's objects and places; light is followed by Mitsuba 3 (``pip install mitsuba``).
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from condgan.files import claim, replace_files
from condgan.images import to_png
from condgan.layout import ASPECT, FOCAL_LENGTH
from condgan.requests import parse_whole
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary

CAMERA = (7.48, -6.51, 5.34)
"""Where the camera is, in CLEVR's units, the floor being at a height of 0; it looks at the middle of the floor."""
COLOURS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
"""How much of red, green and blue light an object throws back, of 255: CLEVR's."""
CENTRE_HEIGHT = 0.62
"""Of every object above the floor: those of i-CLEVR do not quite touch it."""
CUBE_SIDE, SPHERE_RADIUS, CYLINDER_RADIUS, CYLINDER_HEIGHT = 1.13, 0.575, 0.59, 1.08
"""Of the objects, so that they look as large as i-CLEVR's."""
FLOOR_REFLECTANCE = 0.8
LAMPS = {
    "key": ((6.45, -2.91, 4.26), (88.0, 82.0, 70.0)),
    "fill": ((-4.67, -4.01, 3.01), (19.2, 20.9, 26.4)),
    "back": ((-1.17, 2.65, 5.82), (40.2, 40.3, 40.8)),
}
"""CLEVR's square lamps: where, and how bright each is in red, green and blue, fitted to i-CLEVR's mean empty scene."""
LAMP_SIDE = 0.5
LAMP_JITTER = 1.0
"""In each direction, a lamp is up to so far from its place, anew in each scene."""
SUN = ((11.66, -6.63, 25.82), 0.407)
"""CLEVR's sun: from where it shines, and how much light falls on what faces it, likewise fitted."""
AMBIENT = 0.05
"""Light from everywhere."""
REACH = 3.0
"""How far from the middle of the floor, along either axis, objects may stand."""
MIN_DISTANCE = 2.4
"""Between the centres of any two objects that are placed by lot."""
TRIES = 100
"""To place an object, and to place all of a scene, before we give up."""
SAMPLES = 2
"""Ways of light that are followed for each pixel and lamp. With few, pictures have a grain, as i-CLEVR's have."""
NUM_TURNS = 3
"""Objects of a scene of :func:`render_dataset`."""
LIST_LENGTHS = {"test.json": (6, 12, 14), "new_test.json": (0, 12, 20)}
"""How many lists of one, two and three objects :func:`render_dataset` writes: as many as i-CLEVR's files have."""
DESCRIPTION = "render.json"


class PlacedObject(NamedTuple):
    """An object and where it stands."""

    name: str
    """As in ``"red cube"``."""
    x: float
    """Of its centre on the floor, in CLEVR's units, from the middle of the floor, where the camera looks."""
    y: float
    rotation: float
    """About the vertical, in degrees."""


class RenderedScene(NamedTuple):
    """A scene of T turns."""

    empty: Image.Image
    """The floor in the light of this scene."""
    turns: list[Image.Image]
    """T pictures, each with one object more than the last."""
    objects: list[PlacedObject]
    """What each turn added."""
    places: list[tuple[float, float]]
    """The centre of each of these objects, (x, y) in pixels of the picture."""


@dataclass(frozen=True)
class RenderReport:
    """What :func:`render_dataset` did."""

    out: str
    """Where the data set is."""
    scenes: int
    """How many there are now."""
    pictures: int
    """Likewise."""
    rendered: int
    """Scenes that were rendered now; the others were there."""
    seconds: float
    """What this call took."""

    def summary(self) -> str:
        """Two lines for people."""
        before = f", {self.scenes - self.rendered:,} of them from before" if self.rendered < self.scenes else ""
        return (
            f"{self.out}: {self.scenes:,} scenes{before}, {self.pictures:,} pictures; took {self.seconds:.1f} s\n"
            f"  condgan prepare {shlex.quote(self.out)}"
        )


def render_scene(objects: Sequence[str | PlacedObject], seed: int, *, height: int = 240) -> RenderedScene:
    """Render a scene turn by turn.

    Args:
        objects: what each turn adds: names of :data:`condgan.vocab.ICLEVR_OBJECTS`, which may repeat, and objects with
            a place of their own. Where the first is a name it stands in the middle of the floor, as in i-CLEVR; all
            other names get a place by lot, at least :data:`MIN_DISTANCE` from all others, and all names a rotation.
        seed: of places, rotations, light and grain.
        height: of the pictures, in pixels, at least 8; they are 4/3 as wide.

    Returns:
        The pictures (RGB), and what is where. The same on every run with one version of Mitsuba.

    Raises:
        ModuleNotFoundError: Mitsuba is not installed.
        TypeError: ``objects`` holds something else, or ``seed`` or ``height`` is no whole number.
        ValueError: a name is not known, there is no object, or no place left for one, or a number is out of range.
    """
    seed, height = parse_whole("seed", seed, 0), parse_whole("height", height, 8)
    if isinstance(objects, (str, PlacedObject)) or not objects:
        raise ValueError(f"objects must be a list such as ['red cube', 'blue sphere'], got {objects!r}")
    rng = np.random.default_rng(seed)
    placed = _place(objects, rng)
    empty, *turns = _pictures(placed, rng, height, empty=True)
    return RenderedScene(empty, turns, placed, [_pixel(item, height) for item in placed])


def render_dataset(
    out: str | Path, num_scenes: int = 500, seed: int = 0, *, height: int = 240, progress: bool = True
) -> RenderReport:
    """Render a data set in the layout of i-CLEVR, which ``condgan prepare`` reads.

    The folder gets ``images/CLEVR_train_000000_0.png`` and so on, with three turns a scene and no object twice in one,
    ``train.json``, ``objects.json``, and ``test.json`` and ``new_test.json`` with 32 lists each, like i-CLEVR's. Scene
    number i depends on ``seed`` and i only: with a larger ``num_scenes`` a folder is continued, as after an
    interruption.

    Args:
        out: the folder; it is made.
        num_scenes: how many, at least 1.
        seed: of all.
        height: of the pictures, in pixels, at least 8; they are 4/3 as wide.
        progress: show a bar.

    Raises:
        ModuleNotFoundError: Mitsuba is not installed.
        OSError: the folder cannot be written.
        ValueError: an argument is wrong, or the folder holds something else, or more scenes than that.
    """
    start = time.monotonic()
    num_scenes, seed = parse_whole("num_scenes", num_scenes, 1), parse_whole("seed", seed, 0)
    height = parse_whole("height", height, 8)
    out = Path(out)
    images = out / "images"
    labels: dict[str, list[str]] = {}
    rendered = 0
    with _mitsuba():
        claim(out, DESCRIPTION, {"seed": seed, "height": height}, strangers="train.json")
        there = {path.name for path in images.glob("*.png")}
        if _file_name(num_scenes, 0) in there:
            raise ValueError(
                f"num_scenes: {str(out)!r} holds more than {num_scenes:,} scenes: ask for at least as many as "
                "there are, or choose another folder"
            )
        for number in tqdm(range(num_scenes), "rendering", unit="scene", disable=not progress):
            rng = np.random.default_rng((seed, number))
            names = _random_list(rng, NUM_TURNS)
            files = [_file_name(number, turn) for turn in range(NUM_TURNS)]
            labels |= {file: names[: turn + 1] for turn, file in enumerate(files)}
            if not there.issuperset(files):
                pictures = _pictures(_place(names, rng), rng, height, empty=False)
                replace_files(images, {file: to_png(picture) for file, picture in zip(files, pictures, strict=True)})
                rendered += 1
        rng = np.random.default_rng(seed)
        lists = {
            file: [_random_list(rng, length) for length, count in enumerate(counts, 1) for _ in range(count)]
            for file, counts in LIST_LENGTHS.items()
        }
        ids = {name: i for i, name in enumerate(ICLEVR_OBJECTS)}
        contents = {"objects.json": ids, **lists, "train.json": labels}
        replace_files(out, {file: json.dumps(content).encode() for file, content in contents.items()})
    return RenderReport(str(out), num_scenes, len(labels), rendered, round(time.monotonic() - start, 1))


def _file_name(scene: int, turn: int) -> str:
    return f"CLEVR_train_{scene:06d}_{turn}.png"


def _random_list(rng: np.random.Generator, length: int) -> list[str]:
    return [ICLEVR_OBJECTS[i] for i in rng.permutation(len(ICLEVR_OBJECTS))[:length]]


# --- what is where ------------------------------------------------------------------------------------------------


def _place(objects: Sequence[str | PlacedObject], rng: np.random.Generator) -> list[PlacedObject]:
    """Check what is to be rendered, and give names a place by lot and a rotation."""
    vocabulary = Vocabulary()
    named: list[str | PlacedObject] = []
    for item in objects:
        if not isinstance(item, PlacedObject):
            named.append(vocabulary.names[vocabulary.parse(item)])
        elif all(map(math.isfinite, item[1:])):
            named.append(item._replace(name=vocabulary.names[vocabulary.parse(item.name)]))
        else:
            raise ValueError(f"objects: x, y and rotation must be finite numbers, got {item}")
    for _ in range(TRIES):  # what was placed first may leave no place to the rest
        placed = _place_once(named, rng)
        if placed is not None:
            return placed
    raise ValueError(
        f"objects: no place is left for one of {len(objects)}, {MIN_DISTANCE} units from all others: ask for fewer, or "
        "give each a place with PlacedObject"
    )


def _place_once(objects: Sequence[str | PlacedObject], rng: np.random.Generator) -> list[PlacedObject] | None:
    placed = {turn: item for turn, item in enumerate(objects) if isinstance(item, PlacedObject)}
    for turn, item in enumerate(objects):
        if isinstance(item, PlacedObject):
            continue
        for _ in range(TRIES):
            x, y = rng.uniform(-REACH, REACH, 2).tolist() if turn else (0.0, 0.0)
            if all(math.dist((x, y), (other.x, other.y)) >= MIN_DISTANCE for other in placed.values()):
                placed[turn] = PlacedObject(item, x, y, rng.uniform(0, 360))
                break
        else:
            return None
    return [placed[turn] for turn in range(len(objects))]


def _pixel(item: PlacedObject, height: int) -> tuple[float, float]:
    """Where the camera sees the centre of an object."""
    camera = np.array(CAMERA)
    ahead = -camera / np.linalg.norm(camera)
    right = np.cross(ahead, (0, 0, 1))
    right /= np.linalg.norm(right)
    ray = np.array((item.x, item.y, CENTRE_HEIGHT)) - camera
    scale = FOCAL_LENGTH * _width(height) / (ray @ ahead)
    x, y = _width(height) / 2 + scale * (ray @ right), height / 2 - scale * (ray @ np.cross(right, ahead))
    return float(x) - 0.5, float(y) - 0.5


def _width(height: int) -> int:
    return round(height * ASPECT)


# --- what Mitsuba is told -----------------------------------------------------------------------------------------


@contextmanager
def _mitsuba() -> Iterator[None]:
    """Mitsuba follows single rays of three colours on the CPU while this lasts, whatever it did before."""
    try:
        import mitsuba
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("rendering needs a package that is not there: pip install mitsuba") from error
    before = mitsuba.variant()
    mitsuba.set_variant("scalar_rgb")
    try:
        yield
    finally:
        if before is not None:
            mitsuba.set_variant(before)


def _pictures(
    placed: Sequence[PlacedObject], rng: np.random.Generator, height: int, *, empty: bool
) -> list[Image.Image]:
    """The picture after every turn, before them that of the empty scene where it is asked for."""
    with _mitsuba():
        scene, lights, grain = _floor(height), _lights(rng), int(rng.integers(2**31))
        pictures = [_picture(scene, lights, grain)] if empty else []
        for turn, item in enumerate(placed):
            scene |= {f"object {turn} {part}": shape for part, shape in enumerate(_shapes(item))}
            pictures.append(_picture(scene, lights, grain))
    return pictures


def _floor(height: int) -> dict[str, Any]:
    """The empty scene in the dark, and the camera."""
    from mitsuba import ScalarTransform4f

    film = {"type": "hdrfilm", "width": _width(height), "height": height, "pixel_format": "rgb"}
    return {
        "type": "scene",
        "camera": {
            "type": "perspective",
            "fov": math.degrees(2 * math.atan(0.5 / FOCAL_LENGTH)),
            "fov_axis": "x",
            "to_world": _looking_from(CAMERA),
            "film": film | {"rfilter": {"type": "box"}},  # pixels share nothing, so threads may be as many as they like
            "sampler": {"type": "independent", "sample_count": SAMPLES},
        },
        "floor": {
            "type": "rectangle",
            "to_world": ScalarTransform4f().scale([200, 200, 1]),
            "bsdf": _matte([FLOOR_REFLECTANCE] * 3),
        },
    }


def _lights(rng: np.random.Generator) -> list[dict[str, Any]]:
    """What makes it light, each with its way of being followed: one after the other they leave less grain."""
    from mitsuba import ScalarTransform4f

    bounces = {"type": "path", "max_depth": 3, "hide_emitters": True}  # the floor and objects light each other
    lights: list[dict[str, Any]] = []
    for position, radiance in LAMPS.values():
        place = np.array(position) + rng.uniform(-LAMP_JITTER, LAMP_JITTER, 3)
        lamp = {
            "type": "rectangle",
            "to_world": _looking_from(place.tolist()) @ ScalarTransform4f().scale([LAMP_SIDE / 2, LAMP_SIDE / 2, 1]),
            "emitter": {"type": "area", "radiance": _rgb(radiance)},
        }
        lights.append({"integrator": bounces, "light": lamp})
    position, irradiance = SUN
    sun = {"type": "directional", "direction": [-x for x in position], "irradiance": _rgb([irradiance] * 3)}
    ambient = {"type": "constant", "radiance": _rgb([AMBIENT] * 3)}
    around = {"type": "direct", "emitter_samples": 0, "bsdf_samples": 4, "hide_emitters": True}
    return [*lights, {"integrator": bounces, "light": sun}, {"integrator": around, "light": ambient}]


def _looking_from(position: Sequence[float]) -> Any:
    """Mitsuba's transformation to a place from which to look at the middle of the floor."""
    from mitsuba import ScalarTransform4f

    return ScalarTransform4f().look_at(origin=list(position), target=[0, 0, 0], up=[0, 0, 1])


def _shapes(item: PlacedObject) -> list[dict[str, Any]]:
    """What an object consists of."""
    from mitsuba import ScalarTransform4f

    colour, shape = item.name.split()
    matte = _matte([level / 255 for level in COLOURS[colour]])
    centre = [item.x, item.y, CENTRE_HEIGHT]
    there = ScalarTransform4f().translate(centre)
    if shape == "cube":
        turned = there @ ScalarTransform4f().rotate([0, 0, 1], item.rotation)
        return [{"type": "cube", "to_world": turned @ ScalarTransform4f().scale(CUBE_SIDE / 2), "bsdf": matte}]
    if shape == "sphere":
        return [{"type": "sphere", "center": centre, "radius": SPHERE_RADIUS, "bsdf": matte}]
    lid = ScalarTransform4f().translate([0, 0, CYLINDER_HEIGHT / 2]) @ ScalarTransform4f().scale(CYLINDER_RADIUS)
    over = ScalarTransform4f().rotate([1, 0, 0], 180)
    low, high = ([item.x, item.y, CENTRE_HEIGHT + half] for half in (-CYLINDER_HEIGHT / 2, CYLINDER_HEIGHT / 2))
    return [
        {"type": "cylinder", "p0": low, "p1": high, "radius": CYLINDER_RADIUS, "bsdf": matte},
        {"type": "disk", "to_world": there @ lid, "bsdf": matte},
        {"type": "disk", "to_world": there @ over @ lid, "bsdf": matte},
    ]


def _matte(reflectance: Sequence[float]) -> dict[str, Any]:
    return {"type": "diffuse", "reflectance": _rgb(reflectance)}


def _rgb(values: Sequence[float]) -> dict[str, Any]:
    return {"type": "rgb", "value": list(values)}


def _picture(scene: dict[str, Any], lights: Sequence[dict[str, Any]], seed: int) -> Image.Image:
    """Render, and bring light to the 256 levels of sRGB (IEC 61966-2-1)."""
    from mitsuba import load_dict, render

    light = np.sum([np.asarray(render(load_dict(scene | one), seed=seed + i)) for i, one in enumerate(lights)], axis=0)
    light = light.clip(0, 1)
    levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return Image.fromarray((255 * levels).round().astype(np.uint8))
