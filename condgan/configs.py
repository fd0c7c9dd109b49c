"""The architecture of each network in numbers, checked when they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from condgan.fields import added_later, check_fields
from condgan.vocab import ICLEVR_OBJECTS

IMAGE_SIZES = (32, 64, 128)
LARGEST = 65_536
"""Of all other numbers: far beyond what any machine holds."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of an :class:`IterativeGenerator`; the defaults are the reference's."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 64
    """Channels of the last block's output; at 64 pixels the first block's input has 16 times as many."""
    z_dim: int = 100
    """Length of the noise of one turn."""
    condition_dim: int = 256
    """Length of the RNN's state and of its output."""
    objects: tuple[str, ...] = ICLEVR_OBJECTS
    """The vocabulary: names in the order of their ids."""
    num_turns: int = 3
    """Turns a scene had in training; more are drawn with a warning."""
    output: Literal["tanh", "blend"] = "tanh"
    """``tanh``: the whole picture is drawn; ``blend``: it is mixed with the previous picture by a predicted mask,
    and every resolution sees the previous picture's features."""
    places: bool = False
    """Whether the place of the new object is an input; if so, a model of free places is part of the generator."""
    window: int | None = None
    """Side in pixels of the square around the place that a turn may change, a multiple of 8, for models with
    ``places``; None is the whole picture."""
    noise_in_norm: bool = False
    """Whether the noise conditions every norm layer too, beside the first linear one."""
    mapping: bool = False
    """Whether the noise is first mapped to a code that suits the object and its place (:class:`NoiseMapping`)."""
    correction: bool = added_later(False)
    """Whether the mean error of first turns is taken off (:class:`condgan.correction.FirstTurnCorrection`)."""
    light_components: int = 0
    """Directions in which the light of the empty scene varies; 0 starts every scene on one fixed canvas."""
    light_inputs: int = added_later(0)
    """Numbers that tell the norm layers and the mapping how the scene is lit (:class:`condgan.light.SceneLight`); 0: a
    turn knows the light of its window only."""
    words: bool = added_later(False)
    """Whether the RNN knows an object by the words of its name, "red" and "cube", and not as one of a list: then what
    it learns of red things and of cubes tells it what a red cube is, also one that it has never met."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim, num_turns=self.num_turns)
        _check_at_least(0, z_dim=self.z_dim, light_components=self.light_components, light_inputs=self.light_inputs)
        if self.light_inputs and not self.light_components:
            raise ValueError(f"light_inputs={self.light_inputs} needs light that varies: light_components is 0")
        if self.output not in ("tanh", "blend"):
            raise ValueError(f"output must be 'tanh' or 'blend', got {self.output!r}")
        _check_window(self.window, self.image_size, self.places)
        if self.mapping and self.z_dim < 2:
            raise ValueError(f"mapping needs a z_dim of at least 2, got {self.z_dim}")
        check_fields(self)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Architecture of a :class:`DiffDiscriminator`; the defaults are the reference's."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 64
    """Channels of the first block; at 64 pixels the last has 16 times as many."""
    condition_dim: int = 256
    """Length of the condition."""
    objects: tuple[str, ...] = ICLEVR_OBJECTS
    """The vocabulary: names in the order of their ids."""
    places: bool = False
    """Whether the place of the new object is an input."""
    window: int | None = None
    """Side in pixels of the square around the place that is judged, as in :class:`GeneratorConfig`."""
    spectral_norm: bool = True
    """Whether every layer has spectral normalisation; without it the gradient penalties must hold it."""
    light_inputs: int = added_later(0)
    """Numbers that say how the scene is lit, as in :class:`GeneratorConfig`. They are a bias on the difference of the
    features, without spectral normalisation."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, condition_dim=self.condition_dim)
        _check_at_least(0, light_inputs=self.light_inputs)
        _check_window(self.window, self.image_size, self.places)
        check_fields(self)


@dataclass(frozen=True)
class NoiseEncoderConfig:
    """Architecture of a :class:`NoiseEncoder`; the defaults fit the default generator."""

    image_size: int = 64
    """Side of the pictures in pixels: 32, 64 or 128."""
    width: int = 32
    """Channels of the first stage; the third and last has four times as many."""
    z_dim: int = 100
    """Length of the noise."""
    places: bool = False
    """Whether the place of the object is an input."""
    window: int | None = None
    """Side in pixels of the square around the place that is read, as in :class:`GeneratorConfig`."""

    def __post_init__(self) -> None:
        _check_image_size(self.image_size)
        _check_at_least(1, width=self.width, z_dim=self.z_dim)
        _check_window(self.window, self.image_size, self.places)
        check_fields(self)


def _check_window(window: int | None, image_size: int, places: bool) -> None:
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int) or window % 8 or not 16 <= window <= image_size:
        raise ValueError(f"window must be a multiple of 8 from 16 to image_size, which is {image_size}, got {window!r}")
    if not places:
        raise ValueError(f"window is a square around a place: it needs places=True, got window={window}, places=False")


def _check_image_size(image_size: int) -> None:
    if not isinstance(image_size, int) or image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size must be one of {IMAGE_SIZES}, got {image_size!r}")


def _check_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, int) and value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:,}, got {value}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
