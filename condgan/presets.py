"""What a training run depends on, the runs that have names, and changes to them as texts say them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from math import isfinite
from typing import Any, get_args, get_origin, get_type_hints

from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.losses import OBJECTIVES
from condgan.requests import parse_seed
from condgan.vocab import did_you_mean

LEARNING_RATES = ("lr_generator", "lr_discriminator", "lr_encoder", "lr_reconstruction")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. One *picture* is one turn of one scene, seen once by the generator."""

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    objective: str = "reference"
    """Name in :data:`condgan.losses.OBJECTIVES`."""
    images: int = 140 * 16_206
    """Pictures to train on, over both stages; a longer run may go on from a shorter one."""
    reconstruction_images: int = 0
    """Length of the first stage, in pictures: the noise encoder finds the code of the real next picture, from which
    the generator must draw it; no discriminator. Then what a code means is settled: the noise encoder learns no
    more."""
    reconstruction_weight: float = 0.0
    """Adversarial stage: weight of the same reconstruction for half of the pictures; the others get random noise, as
    all do with a weight of 0."""
    batch_scenes: int = 11
    """Scenes a step, over all ranks; every turn of a scene is one picture."""
    lr_generator: float = 1e-4
    lr_discriminator: float = 4e-4
    lr_encoder: float = 1e-3
    """The RNN in the adversarial stage. See :attr:`keeps_chance` for 0."""
    beta2: float = 0.9
    """Adam's second coefficient in the adversarial stage; the first is 0."""
    lr_reconstruction: float = 1e-3
    """Generator and encoder in the first stage."""
    penalty_interval: int = 1
    """Gradient penalties every so many steps, multiplied by as much."""
    decay_images: int = 0
    """Pictures at the end of the run over which the learning rates fall linearly to a tenth."""
    own_pictures: float = 0.0
    """Share of scenes, at the end of the run, whose turns start from the model's own picture; grows from 0."""
    history_dropout: float = 0.0
    """Share of scenes of which the RNN reads every turn as if it were the first, as it is when an object is added to a
    picture from elsewhere: what stands there is then known from the picture only."""
    ema_halflife_images: int = 10_000
    """Pictures after which a weight has half its influence on the averaged model."""
    init_generator: str | None = None
    """Name, folder or hub id of a generator to start from, without its correction of first turns; None: a fresh one."""
    init_discriminator: str | None = None
    """Name, folder or hub id of a discriminator to start from; None starts afresh."""
    init_noise_encoder: str | None = None
    """Name, folder or hub id of a noise encoder to start from; None starts afresh."""
    verifier: str = "verifier"
    """Name, folder or hub id of the classifier whose word ``legibility_weight`` counts."""
    legibility_weight: float = 0.0
    """Adversarial stage: weight of the verifier's cross-entropy for the objects so far, in what the generator draws."""
    bf16: bool = True
    """Autocast to bfloat16, on devices that multiply it (:func:`condgan.precision.fast_bfloat16`). Weights and
    optimizers stay float32, and so does what the discriminator makes of its features."""
    seed: int = 0
    """From 0 to 2**63 - 1."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            fits = isinstance(value, (float, int) if kind is float else kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
        parse_seed(self.seed)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {sorted(OBJECTIVES)}, got {self.objective!r}")
        for name in ("batch_scenes", "penalty_interval", "ema_halflife_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("images", "reconstruction_images", "decay_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (*LEARNING_RATES, "reconstruction_weight", "legibility_weight"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, not negative, got {value}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be from 0 to less than 1, got {self.beta2}")
        for name in ("own_pictures", "history_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, got {getattr(self, name)}")
        if self.reconstruction_weight and not (self.reconstruction_images or self.init_noise_encoder):
            raise ValueError(
                f"reconstruction_weight={self.reconstruction_weight} needs a noise encoder that has learned: "
                "give reconstruction_images or init_noise_encoder"
            )
        for name in ("image_size", "places", "window", "condition_dim", "objects", "light_inputs"):
            ours, theirs = getattr(self.generator, name), getattr(self.discriminator, name)
            if ours != theirs:
                raise ValueError(f"generator and discriminator must agree on {name}, got {ours!r} and {theirs!r}")

    @property
    def keeps_chance(self) -> bool:
        """Whether places and codes are drawn as the generator draws them from which the run starts.

        So it is with ``init_generator`` and ``lr_encoder=0``, without a first stage: what place model and mapping read
        stays as it is, and they learn nothing more, neither step by step nor at the end of the run.
        """
        return self.init_generator is not None and self.lr_encoder == 0 and self.reconstruction_images == 0

    @property
    def noise_encoder(self) -> NoiseEncoderConfig | None:
        """The noise encoder's architecture; None where nothing is reconstructed."""
        if not (self.reconstruction_images or self.reconstruction_weight):
            return None
        ours = self.generator
        return NoiseEncoderConfig(image_size=ours.image_size, z_dim=ours.z_dim, places=ours.places, window=ours.window)


PRESETS: dict[str, TrainConfig] = {
    "reference": TrainConfig(),
    "reference-code": TrainConfig(objective="reference-code", lr_encoder=3e-4),
    "compact": TrainConfig(
        generator=GeneratorConfig(
            width=24,
            z_dim=6,
            output="blend",
            places=True,
            window=40,
            noise_in_norm=True,
            mapping=True,
            correction=True,
            light_components=64,
            light_inputs=12,
        ),
        discriminator=DiscriminatorConfig(width=32, places=True, window=40, spectral_norm=False, light_inputs=12),
        objective="relativistic",
        images=500_000,
        reconstruction_images=65_000,
        reconstruction_weight=10.0,
        batch_scenes=5,
        lr_generator=3e-4,
        lr_discriminator=5e-4,
        lr_encoder=3e-4,
        beta2=0.99,
        penalty_interval=4,
        decay_images=130_000,
        own_pictures=0.8,
        history_dropout=0.25,
        legibility_weight=3.0,
    ),
}


def find_preset(name: str) -> TrainConfig:
    """The preset of a name.

    Raises:
        ValueError: there is none; the message says what the name may have meant.
    """
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}: {did_you_mean(name, PRESETS)} The presets are {', '.join(PRESETS)}."
        )
    return PRESETS[name]


def with_fields(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """The config with some fields changed, all at once, each given as ``FIELD=VALUE``.

    Raises:
        ValueError: there is no such field, or its value does not fit.
    """
    hints = _field_types(type(config))
    parts: dict[str, dict[str, Any]] = {"": {}}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not FIELD=VALUE, such as lr_generator=1e-4")
        if field not in hints:
            raise ValueError(
                f"unknown field {field!r}: {did_you_mean(field, hints)} The fields are those of "
                "condgan.presets.TrainConfig."
            )
        part, _, name = field.rpartition(".")
        parts.setdefault(part, {})[name] = _field_value(field, text, hints[field])
    changes = parts.pop("")
    nested = {part: replace(getattr(config, part), **values) for part, values in parts.items()}
    return replace(config, **changes, **nested)


def _field_types(config_class: Any) -> dict[str, Any]:
    """Field name -> type; the fields of a config inside the config are called ``generator.width``."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            types |= {f"{name}.{field}": kind for field, kind in _field_types(hint).items()}
        else:
            types[name] = hint
    return types


def _field_value(field: str, text: str, hint: Any) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it does not stand for one of that type.
    """
    if get_origin(hint) is tuple:
        return tuple(_field_value(field, item.strip(), get_args(hint)[0]) for item in text.split(","))
    if type(None) in get_args(hint):  # such as `str | None`
        return None if text.lower() == "none" else _field_value(field, text, get_args(hint)[0])
    words = {"true": True, "false": False} if hint is bool else {word: word for word in get_args(hint)}
    if words:
        if text.lower() not in words:
            raise ValueError(f"{field} must be {' or '.join(words)}, got {text!r}")
        return words[text.lower()]
    try:
        return hint(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[hint]
        raise ValueError(f"{field} must be {kind}, got {text!r}") from None
