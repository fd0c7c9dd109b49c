"""The networks: iterative generator, difference discriminator, noise encoder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import log2
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from condgan import drawing
from condgan import images as pictures
from condgan.canvas import Canvas
from condgan.configs import DiscriminatorConfig, GeneratorConfig, NoiseEncoderConfig
from condgan.correction import ANSWERS, EDGE, FirstTurnCorrection
from condgan.drawing import Redraw, SceneNoise
from condgan.functional import channels_last, crop, paste
from condgan.hub import PretrainedModel
from condgan.layers import NEGATIVE_SLOPE, ConditionProjector, DisBlock, GenBlock, normalised, weights_made_once
from condgan.light import SceneLight
from condgan.onnx import Sessions, compiled
from condgan.parts import (
    ConditionRNN,
    NoiseMapping,
    PlaceModel,
    PreviousImageEncoder,
    View,
    check_place,
    check_shape,
    coarsest,
    look,
    widths_of,
)
from condgan.precision import full_precision, is_coarse
from condgan.requests import Place
from condgan.results import Drawing, Turn
from condgan.vocab import Vocabulary

if TYPE_CHECKING:
    from typing_extensions import Self

SHARED_BLOCKS = 3
"""Blocks of the discriminator that both pictures pass before their features are subtracted."""
NOISE_ENCODER_SLOPE = 0.1
LARGEST_MAP = 2**24
"""Bytes. In eval mode a CPU draws so many turns at once that the largest map takes no more: it stays in the caches, and
glibc's allocator gives memory of 32 MiB and more back to the system, whose pages are then made anew for every map."""


class IterativeGenerator(PretrainedModel):
    """Draws one more object into a picture; a scene is drawn by repeating this from an empty one.

    One turn (:meth:`forward`): the noise and the projected condition become a 4x4 map, four blocks (at 64 pixels) bring
    it to full size, and features of the previous picture join at 8x8. With ``config.window`` all this is done in a
    square around the place of the new object, and what is outside stays as it was, bit for bit; of what is outside only
    the light is seen, with ``config.light_inputs``. Scenes are drawn by :meth:`generate`.

    Args:
        config: the architecture; None is the reference's, 64x64 and 24 objects.

    Shape:
        z: (N, z_dim), standard normal.
        condition: (N, condition_dim), output of ``encoder``.
        prev_image: (N, 3, H, W) in [-1, 1].
        place: (N, 2) centre of the new object in pixels (x, y), if ``config.places``; else None.
        light: (N, light_inputs), what :meth:`read_light` says of ``prev_image``; None has it read.
        output: (N, 3, H, W) in [-1, 1], dtype of ``prev_image``, which may be finer than the network's.

    Raises:
        ValueError: an input does not have the shape above.

    Source: the report of May 2020 that docs/architecture.md describes; SNGAN-projection blocks of Miyato and Koyama
    2018, arXiv:1802.05637; blended output after Pumarola et al. 2018, arXiv:1807.09251.

    Example:
        >>> generator = IterativeGenerator(GeneratorConfig(width=4)).eval()
        >>> condition, hidden = generator.encoder(torch.eye(24)[:2])
        >>> generator(torch.randn(2, 100), condition, torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])
    """

    config_class: ClassVar[type] = GeneratorConfig
    default_pretrained: ClassVar[str | None] = "iclevr-64"
    config: GeneratorConfig

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = config = self.given_or_default(config)
        self.vocabulary = Vocabulary(config.objects)
        spelling = self.vocabulary.spelling() if config.words else None
        self.encoder = ConditionRNN(len(self.vocabulary), config.condition_dim, spelling)
        size = config.window or config.image_size
        self.coarsest = coarsest(size)
        num_blocks = int(log2(size // self.coarsest))
        widths = [*reversed(widths_of(num_blocks + 1, config.width))]  # of the coarsest map and of each block's output
        skips = config.output == "blend"
        channels = widths[-2:0:-1]  # of the previous picture's features: as many as the generator has there
        if config.window is None:  # the reference's: fewer, but for the last
            channels = [*widths_of(num_blocks - 1, config.width)[:-1], 8 * config.width]
        known = 3 + sum(View.channels(config))
        self.prev_encoder = PreviousImageEncoder(known, channels)
        joined = [*reversed(channels)]  # from the second resolution up
        joined = joined if skips else [joined[0], *(0 for _ in joined[1:])]
        norm_dim = config.condition_dim + (config.z_dim if config.noise_in_norm else 0) + config.light_inputs

        self.c_proj = nn.Linear(config.condition_dim, config.condition_dim)
        self.l0 = nn.Linear(config.z_dim + config.condition_dim, widths[0] * self.coarsest**2)
        # The largest weight, read once a picture: with the inputs' rows one after the other in a third of the time.
        self.l0.weight = nn.Parameter(self.l0.weight.detach().T.contiguous().T)
        for i, extra in enumerate([0, *joined]):
            setattr(self, f"block{i + 1}", GenBlock(widths[i] + extra, widths[i + 1], norm_dim))
        self.num_blocks = num_blocks
        self.bn = nn.BatchNorm2d(widths[-1])
        self.ac = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.conv = nn.Conv2d(widths[-1] + (known if skips else 0), 7 if skips else 3, 3, padding=1)
        if skips:  # a fresh generator keeps most of the previous picture, and adds nothing to it
            weight, bias = self.conv.get_parameter("weight"), self.conv.get_parameter("bias")
            nn.init.constant_(bias[3], -2.0)
            nn.init.zeros_(weight[4:])
            nn.init.zeros_(bias[4:])
        self.tanh = nn.Tanh()

        self.canvas = Canvas(config.image_size, config.light_components)
        self.light = SceneLight(config.light_inputs) if config.light_inputs else None
        self.place_model = None
        if config.places:
            self.place_model = PlaceModel(config.image_size, config.condition_dim, config.light_inputs)
        self.mapping = NoiseMapping(config) if config.mapping else None
        self.correction = None
        if config.correction:
            self.correction = FirstTurnCorrection(
                len(self.vocabulary),
                config.condition_dim,
                config.image_size,
                config.light_inputs,
                config.places,
                config.z_dim if config.mapping else 0,
                (config.window or config.image_size) - 2 * EDGE,
                ANSWERS * len(set(self.vocabulary.shapes)),
            )
        self.graphs: Sessions | None = None
        """What draws single pictures instead; see :meth:`compile`."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what a scene takes most of its time for, each part when it is first used.

        That is the empty scene, the light, the place of an object and the turn; the RNN would save next to nothing.
        Arguments are those of :func:`torch.compile`.

        ``backend="onnxruntime"``, alone, is for drawing single pictures on a CPU: ONNX Runtime does it, with one
        thread, from graphs in which weights are constants (:mod:`condgan.onnx`; needs the extra ``onnx``). Batches are
        drawn as before, and everything is again when the generator is moved or converted.

        Raises:
            ModuleNotFoundError: a package of the extra ``onnx`` is not installed.
            ValueError: the generator is not in float32 on the CPU, and ONNX Runtime is to draw.
        """
        if not args and kwargs == {"backend": "onnxruntime"}:
            self.graphs = compiled(self)
            return
        super().compile(*args, **kwargs)
        for part in (self.canvas, self.light, self.place_model):
            if part is not None:
                part.compile(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.graphs = None  # of the weights as they were
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which belong to this process."""
        return {**super().__getstate__(), "graphs": None}  # type: ignore[no-untyped-call]

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.config.image_size

    @property
    def z_dim(self) -> int:
        """Length of the noise of one turn."""
        return self.config.z_dim

    @property
    def num_turns(self) -> int:
        """Turns of the scenes that the model was trained on."""
        return self.config.num_turns

    def forward(
        self,
        z: Tensor,
        condition: Tensor,
        prev_image: Tensor,
        place: Tensor | None = None,
        light: Tensor | None = None,
    ) -> Tensor:
        self._check_turn(z, condition, prev_image, place)
        if light is None:
            light = self.read_light(prev_image)
        else:
            check_shape("light", light, prev_image.shape[0], self.config.light_inputs)
        code = z if self.mapping is None else self.mapping(z, condition, place, light)
        return self._turn(code, condition, prev_image, place, light)

    if TYPE_CHECKING:
        __call__ = forward

    def read_light(self, prev_image: Tensor) -> Tensor | None:
        """How the picture so far is lit, (N, light_inputs); None for models that do not ask."""
        return None if self.light is None else self.light(prev_image)

    def synthesis(self, code: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None = None) -> Tensor:
        """:meth:`forward` after the mapping: what draws with a code that a :class:`NoiseEncoder` found.

        Args:
            code: (N, z_dim); for models without a mapping the noise itself.
            condition: as in :meth:`forward`, like all that follow.
            prev_image: the picture so far.
            place: where the object goes.

        Returns:
            As :meth:`forward`.
        """
        self._check_turn(code, condition, prev_image, place)
        return self._turn(code, condition, prev_image, place, self.read_light(prev_image))

    def _turn(
        self, code: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None, light: Tensor | None
    ) -> Tensor:
        view = look([prev_image], place, self.config.window)
        known = channels_last(torch.cat((*view.images, *view.maps, *view.details), 1).to(condition.dtype))
        arguments = [code, condition, view.images[0], known, *([] if light is None else [light])]
        size = self._turns_at_once(known)
        if size >= known.shape[0]:
            drawn = self._draw(*arguments)
        else:
            drawn = torch.cat([self._draw(*part) for part in zip(*(x.split(size) for x in arguments), strict=True)])
        offset = None if self.correction is None else self.correction(condition, light, place, code)
        if offset is not None:
            if view.corners is not None:
                offset = crop(offset, view.corners, drawn.shape[-1])
            drawn = (drawn + offset.to(drawn.dtype)).clamp(-1, 1)
        return drawn if view.corners is None else paste(prev_image, drawn, view.corners)

    def _check_turn(self, z: Tensor, condition: Tensor, prev_image: Tensor, place: Tensor | None) -> None:
        size = self.config.image_size
        if prev_image.shape[1:] != (3, size, size):
            raise ValueError(f"prev_image must be (N, 3, {size}, {size}), got {tuple(prev_image.shape)}")
        check_shape("z", z, prev_image.shape[0], self.config.z_dim)
        check_shape("condition", condition, prev_image.shape[0], self.config.condition_dim)
        check_place(self.config.places, place, prev_image.shape[0])

    def _turns_at_once(self, known: Tensor) -> int:
        """How many of N turns pass the blocks together, given the maps (N, C, h, w) that they start from."""
        exported = isinstance(known.shape[0], torch.SymInt)  # in a graph for any N
        if self.training or torch.is_grad_enabled() or known.device.type != "cpu" or exported:
            return known.shape[0]
        largest = self.config.width * known.shape[2] * known.shape[3] * known.element_size()
        return max(LARGEST_MAP // largest, 1)

    def _draw(
        self, code: Tensor, condition: Tensor, prev_image: Tensor, known: Tensor, light: Tensor | None = None
    ) -> Tensor:
        """The turn inside the window: ``known`` is ``prev_image`` (N, 3, h, w) with the maps of its place."""
        features = self.prev_encoder(known)[::-1]  # from the second resolution up
        norm_condition = torch.cat((condition, code), 1) if self.config.noise_in_norm else condition
        if light is not None:
            norm_condition = torch.cat((norm_condition, light.to(condition.dtype)), 1)

        x = self.l0(torch.cat((code, self.c_proj(condition)), 1)).unflatten(1, (-1, self.coarsest, self.coarsest))
        x = channels_last(x)
        for i in range(self.num_blocks):
            if i == 1 or (i > 1 and self.config.output == "blend"):
                x = torch.cat((x, features[i - 1]), 1)
            x = self.get_submodule(f"block{i + 1}")(x, norm_condition)  # twice as high and wide
        x = self.ac(self.bn(x))  # (N, width, H, W)
        if self.config.output == "tanh":
            return self.tanh(self.conv(x)).to(prev_image.dtype)
        x = self.conv(torch.cat((x, known), 1))
        x = x.to(prev_image.dtype)  # blended at full precision: what stays, stays exact
        drawn, mask, faint = x.split((3, 1, 3), 1)
        blended = torch.lerp(prev_image, self.tanh(drawn), mask.sigmoid())
        return blended.add(faint, alpha=pictures.LEVEL).clamp(-1, 1)

    def generate(
        self,
        conditions: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        num_images: int = 1,
        seed: int | None = None,
        at: Sequence[Place | Sequence[Place | None] | None] | None = None,
        best_of: int = 1,
        redraw: Redraw = "picture",
        batch_size: int | None = None,
    ) -> Drawing:
        """Draw scenes.

        Args:
            conditions: the objects of one scene in the order they are added, such as ``["red cube", "blue sphere"]``;
                or a list of such lists; or one name.
            num_images: draws of each scene.
            seed: of the first picture; the others get seed + 1, seed + 2, ... None is a fresh one. A picture depends
                on its conditions, places and seed only, not on what else is drawn.
            at: for each object the centre in pixels (x, y), or None to have it drawn; for a batch a list of such lists.
            best_of: draw so many candidates of each picture and keep the one the bundled verifier likes best; its seed
                and score are in the result. Costs as many times more.
            redraw: what ``best_of`` is about: ``"picture"`` as above; ``"turn"`` draws only those turns again, on the
                same picture, after which the verifier does not find the objects asked so far, up to ``best_of`` times
                (:data:`condgan.drawing.GOOD_TURN`). Where the first draw is right that costs next to nothing:
                ``result.draws`` says what it took.
            batch_size: pictures that pass the network at once. None: on a CPU one, so that a picture is the same, bit
                for bit, whatever else is drawn; on a GPU 256. With 16 a CPU draws many pictures several times as
                fast, and they are the same but for last bits, which may decide on a level of 256. Models without a
                ``window`` may carry that further from turn to turn.

        Returns:
            A :class:`condgan.Drawing`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: a list is empty, a name unknown, a place outside the picture, the model knows no places, or
                ``redraw`` is something else; ``batch_size`` is below 1.

        Warns:
            condgan.requests.TooManyObjectsWarning: a scene has more objects than those the model was trained on.

        Example:
            >>> IterativeGenerator(GeneratorConfig(width=4)).generate(["red cube"], num_images=2, seed=7).seeds
            [7, 8]
        """
        return drawing.draw(
            self,
            conditions,
            num_images=num_images,
            seed=seed,
            at=at,
            best_of=best_of,
            redraw=redraw,
            batch_size=batch_size,
        )

    def add(
        self,
        image: Image.Image | str | os.PathLike[str] | np.ndarray | Tensor,
        conditions: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int | None = None,
        at: Sequence[Place | None] | None = None,
        best_of: int = 1,
        redraw: Redraw = "picture",
        batch_size: int | None = None,
    ) -> Drawing:
        """Add objects to a picture from anywhere.

        Args:
            image: a PIL picture of any mode and size, a path, a uint8 array (H, W[, 3 or 4]), or a tensor or array
                (3, H, W), uint8 or floating point in [-1, 1]. It is resized to the model's size.
            conditions: the objects to add, as in :meth:`generate`, like all that follow.
            num_images: draws of each scene.
            seed: of the first picture.
            at: for each object its centre in pixels of the model's size, or None to have it drawn.
            best_of: candidates of each picture, or of each turn.
            redraw: which of the two.
            batch_size: pictures that pass the network at once.

        Returns:
            As :meth:`generate`.
        """
        start = pictures.load_image(image, self.config.image_size)
        return drawing.draw(
            self,
            conditions,
            num_images=num_images,
            seed=seed,
            at=at,
            best_of=best_of,
            redraw=redraw,
            batch_size=batch_size,
            start=start,
        )

    def stream(
        self, conditions: str | Sequence[str], *, seed: int | None = None, at: Sequence[Place | None] | None = None
    ) -> Iterator[Turn]:
        """Draw one scene and hand out every turn as it is done; arguments as in :meth:`generate`.

        Yields:
            :class:`condgan.Turn`: ``image``, ``added``, ``difference``, ``place``.
        """
        return drawing.stream(self, conditions, seed=seed, at=at)

    def noise(self, seeds: int | Sequence[int], turns: int) -> SceneNoise:
        """The random numbers that scenes of these seeds are drawn from, for rollouts of your own.

        With them :func:`condgan.functional.rollout` draws what :meth:`generate` draws, or what lies between two seeds:
        docs/quickstart.md shows how. They are those of scenes that are drawn once, with ``best_of=1``.

        Args:
            seeds: N seeds, 0 to 2**63 - 1, or one.
            turns: number T of turns. The first ones are the same however many there are.

        Returns:
            :class:`condgan.drawing.SceneNoise`: ``light``, ``grain``, ``uniform`` and ``z``.

        Raises:
            TypeError: an argument is no whole number.
            ValueError: there are no seeds, one is out of range, or ``turns`` is below 1.

        Example:
            >>> IterativeGenerator(GeneratorConfig(width=4)).noise([7, 8], turns=3).z.shape
            torch.Size([2, 3, 100])
        """
        return drawing.scene_noise(self, seeds, turns)


class DiscriminatorOutput(NamedTuple):
    """What the discriminator says of N pairs of pictures."""

    logits: Tensor
    """(N,) unbounded, positive means real."""
    object_logits: Tensor
    """(N, K): which object was added."""


class DiffDiscriminator(PretrainedModel):
    """Judges the difference between two pictures: is it a real object, and the one that was asked for?

    Both pictures pass the first three blocks, their features are subtracted, and the difference goes on.

    The two pictures are nearly equal, and what bfloat16 rounds off is more than what tells a drawn turn from a real
    one (docs/experiments.md). So with weights of 16 bits and under ``torch.autocast`` not the second picture passes the
    first blocks but its difference to the first one (:meth:`condgan.layers.DisBlock.changes`), and the logits are
    found in the precision of the weights.

    With spectral normalisation PyTorch cannot pickle it; :meth:`save_pretrained` and ``state_dict`` are for that.

    Args:
        config: the architecture; None is the reference's, 64x64 and 24 objects.

    Shape:
        prev_image: (N, 3, H, W) in [-1, 1], the picture before the turn.
        image: (N, 3, H, W) in [-1, 1], the picture after the turn, to be judged.
        condition: (N, condition_dim).
        place: (N, 2) asked centre of the object in pixels (x, y), if ``config.places``; else None.
        output: :class:`DiscriminatorOutput`.

    Raises:
        ValueError: an input does not have the shape above.

    Source: the report of May 2020 that docs/architecture.md describes; projection after Miyato and Koyama 2018,
    arXiv:1802.05637; auxiliary head after Odena et al. 2017, arXiv:1610.09585.

    Example:
        >>> discriminator = DiffDiscriminator(DiscriminatorConfig(width=4))
        >>> before, after = torch.zeros(2, 2, 3, 64, 64)
        >>> discriminator(before, after, torch.randn(2, 256)).logits.shape
        torch.Size([2])
    """

    config_class: ClassVar[type] = DiscriminatorConfig
    config: DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = self.given_or_default(config)
        self.vocabulary = Vocabulary(config.objects)
        self.num_blocks = int(log2((config.window or config.image_size) // 2))
        widths = [3 + sum(View.channels(config)), *widths_of(self.num_blocks, config.width)]
        for i in range(self.num_blocks):
            setattr(self, f"block{i + 1}", DisBlock(widths[i], widths[i + 1], i > 0, config.spectral_norm))
        self.light = SceneLight(config.light_inputs) if config.light_inputs else None
        if config.light_inputs:  # a fresh one disregards it
            self.light_bias = nn.Linear(config.light_inputs, widths[SHARED_BLOCKS], bias=False)
            nn.init.zeros_(self.light_bias.weight)
        num_features = widths[-1]
        hidden = max(num_features // 4, 1)
        self.l6 = normalised(nn.Linear(num_features, 1), config.spectral_norm)
        self.condition_projector = ConditionProjector(config.condition_dim, num_features, config.spectral_norm)
        self.aux_objective = nn.Sequential(
            normalised(nn.Linear(num_features, hidden), config.spectral_norm),
            nn.ReLU(),
            normalised(nn.Linear(hidden, len(self.vocabulary)), config.spectral_norm),
        )

    def compare(
        self, prev_image: Tensor, images: Sequence[Tensor], condition: Tensor, place: Tensor | None = None
    ) -> list[DiscriminatorOutput]:
        """Judge several pictures that follow the same previous one: each as :meth:`forward` does.

        The previous picture is read once, together with the first of the pictures. Each of the others passes alone: a
        gradient that is asked for of one picture then costs no pass through the others.
        """
        n, size = prev_image.shape[0], self.config.image_size
        if not images:
            raise ValueError("images is empty: give at least one picture to judge")
        for name, image in (("prev_image", prev_image), *(("image", image) for image in images)):
            check_shape(name, image, n, 3, size, size)
        check_shape("condition", condition, n, self.config.condition_dim)
        check_place(self.config.places, place, n)
        view = look([prev_image, *images], place, self.config.window)
        maps = [map_.to(prev_image.dtype) for map_ in view.maps]
        inputs = [torch.cat((image, *maps, *view.details[i : i + 1]), 1) for i, image in enumerate(view.images)]
        with weights_made_once():
            weight = self.l6.weight
            carried = is_coarse(weight) and self._carries_changes
            differences = self._changes(inputs) if carried else self._differences(inputs)
            light = None if self.light is None else self.light_bias(self.light(prev_image).to(weight.dtype))
            return [self._judge(difference, condition, light) for difference in differences]

    @property
    def _carries_changes(self) -> bool:
        """Whether differences can pass the blocks; not if one was replaced or has hooks, which then sees pictures."""
        blocks = [self.get_submodule(f"block{i + 1}") for i in range(SHARED_BLOCKS)]
        return all(type(block) is DisBlock and block.carries_changes for block in blocks)

    def _differences(self, inputs: list[Tensor]) -> list[Tensor]:
        """How pictures with their maps differ from the first of them in what the blocks before the difference see."""
        before, first = self._features(torch.cat(inputs[:2])).unflatten(0, (2, inputs[0].shape[0])).unbind()
        return [features - before for features in (first, *(self._features(x) for x in inputs[2:]))]

    def _features(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for i in range(SHARED_BLOCKS):
            x = self.get_submodule(f"block{i + 1}")(x)
        return x

    def _changes(self, inputs: list[Tensor]) -> list[Tensor]:
        """As :meth:`_differences`, but it is the differences that pass the blocks."""
        before, *others = inputs
        dtype = self.l6.weight.dtype
        x, *changes = (channels_last(y.to(dtype)) for y in (before, *(y - before for y in others)))
        for i in range(SHARED_BLOCKS):
            x, changes = cast(DisBlock, self.get_submodule(f"block{i + 1}")).changes(x, changes)
        return changes

    def _judge(self, x: Tensor, condition: Tensor, light: Tensor | None) -> DiscriminatorOutput:
        """What the difference of features says: all zeros where nothing changed. What changed must fit ``light``."""
        if light is not None:
            x = x + light[:, :, None, None]
        for i in range(SHARED_BLOCKS, self.num_blocks):
            x = self.get_submodule(f"block{i + 1}")(x)
        with full_precision(x.device):  # a logit is a small difference of large sums
            dtype = self.l6.weight.dtype
            features = F.leaky_relu(x.to(dtype), NEGATIVE_SLOPE).sum((2, 3))
            logits = self.l6(features)[:, 0] + self.condition_projector(features, condition.to(dtype))
            return DiscriminatorOutput(logits, self.aux_objective(features))

    def forward(
        self, prev_image: Tensor, image: Tensor, condition: Tensor, place: Tensor | None = None
    ) -> DiscriminatorOutput:
        return self.compare(prev_image, [image], condition, place)[0]

    if TYPE_CHECKING:
        __call__ = forward


class NoiseEncoder(PretrainedModel):
    """Finds the code with which a generator would draw a given turn: the pose of a cube, for example.

    It is trained together with the generator, which must draw the real picture from it; without it nothing would tell
    the generator which code stands for which pose. Over a batch every number of the code has mean 0 and, once it tells
    pictures apart, variance 1, by a batch norm without parameters. For a generator with a :class:`NoiseMapping` that is
    where :meth:`IterativeGenerator.synthesis` starts; for others it is the noise.

    Args:
        config: the architecture; None is the default generator's.

    Shape:
        prev_image: (N, 3, H, W) in [-1, 1], the picture before the turn.
        image: (N, 3, H, W) in [-1, 1], the picture after it.
        place: (N, 2) centre of the new object in pixels (x, y), if ``config.places``; else None.
        output: (N, z_dim), of mean 0 and variance 1 over all turns.

    Modes: training normalises with the statistics of the batch, of at least two turns; eval with the running ones.

    Source: the encoder of Zhu et al. 2017 (BicycleGAN), arXiv:1711.11586, section 3.2, with the batch norm of Zhu et
    al. 2020 (BN-VAE), arXiv:2004.12585, in place of a Kullback-Leibler term.

    Example:
        >>> before, after = torch.rand(2, 4, 3, 64, 64) * 2 - 1
        >>> NoiseEncoder(NoiseEncoderConfig(width=4, z_dim=6))(before, after).shape
        torch.Size([4, 6])
    """

    config_class: ClassVar[type] = NoiseEncoderConfig
    config: NoiseEncoderConfig

    def __init__(self, config: NoiseEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = self.given_or_default(config)
        sizes = [6 + View.channels(config)[1], *widths_of(3, config.width)]
        self.stages = nn.Sequential()
        for i, o in pairwise(sizes):
            self.stages.append(nn.Sequential(nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(NOISE_ENCODER_SLOPE)))
            self.stages.append(nn.Sequential(nn.Conv2d(o, o, 3, 1, 1), nn.LeakyReLU(NOISE_ENCODER_SLOPE)))
        self.linear = nn.Linear(2 * sizes[-1], config.z_dim)
        self.norm = nn.BatchNorm1d(config.z_dim, affine=False)

    def forward(self, prev_image: Tensor, image: Tensor, place: Tensor | None = None) -> Tensor:
        n, size = prev_image.shape[0], self.config.image_size
        for name, picture in (("prev_image", prev_image), ("image", image)):
            check_shape(name, picture, n, 3, size, size)
        check_place(self.config.places, place, n)
        view = look([prev_image, image], place, self.config.window)
        before, after = view.images
        x = torch.cat((after, after - before, *view.maps), 1)
        x = x.to(self.linear.weight.dtype)
        x = self.stages(channels_last(x))
        code = self.linear(torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1))
        return self.norm(code.to(self.norm.running_mean))  # in float32, unless the network was made coarser or finer

    if TYPE_CHECKING:
        __call__ = forward
