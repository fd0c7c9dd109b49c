"""Draw i-CLEVR scenes one object at a time: small generators with pretrained weights inside the package."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DiffDiscriminator",
    "DiscriminatorConfig",
    "Drawing",
    "GeneratorConfig",
    "IterativeGenerator",
    "NoiseEncoder",
    "NoiseEncoderConfig",
    "ObjectCounter",
    "ObjectCounterConfig",
    "SceneClassifier",
    "SceneClassifierConfig",
    "Turn",
    "Vocabulary",
    "list_pretrained",
]

if TYPE_CHECKING:
    from condgan.classifier import SceneClassifier, SceneClassifierConfig
    from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
    from condgan.counter import ObjectCounter, ObjectCounterConfig
    from condgan.hub import list_pretrained
    from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
    from condgan.remote import CheckpointError
    from condgan.results import Drawing, Turn
    from condgan.vocab import Vocabulary
else:
    _MODULES = ("vocab", "remote", "hub", "configs", "classifier", "counter", "results", "models")

    def __getattr__(name: str) -> object:
        """A public name or a module, imported when it is asked for: PyTorch, which they need, takes seconds."""
        if name in __all__:
            return next(vars(module)[name] for module in map(_module, _MODULES) if name in vars(module))
        try:
            return _module(name)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def _module(name: str) -> object:
        return import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
