"""Draw i-CLEVR scenes one object at a time: small generators with pretrained weights inside the package."""

from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.counter import ObjectCounter, ObjectCounterConfig
from condgan.hub import CheckpointError, list_pretrained
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.results import Drawing, Turn
from condgan.vocab import Vocabulary

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
