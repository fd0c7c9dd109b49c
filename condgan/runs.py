"""Runs of training: the loop, and the folder with checkpoints that resume exactly, a log, models and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from condgan.batches import TrainingScenes, own_parts
from condgan.checkpoints import CHECKPOINT, learned_from, read_checkpoint, restore, save_checkpoint
from condgan.classifier import SceneClassifier, same_weights
from condgan.configs import IMAGE_SIZES
from condgan.datasets import SceneDataset
from condgan.devices import cpu_by_default
from condgan.drawing import draw_turns
from condgan.files import locked
from condgan.functional import changed_region, paste, place_of_change, window_corners
from condgan.images import from_uint8
from condgan.models import DiffDiscriminator, IterativeGenerator, NoiseEncoder
from condgan.presets import TrainConfig
from condgan.ranks import RankLost, Ranks, joined
from condgan.requests import fold_seed
from condgan.results import Drawing
from condgan.runlog import LOG_INTERVAL, RunLog
from condgan.training import Trainer, TrainingDiverged

WINDOWED_SCENES = 200
"""So many scenes are looked at to see whether objects fit into windows."""
OUTSIDE_WINDOWS = 0.02
"""Share of changed pixels that may lie outside; of i-CLEVR 0 for windows of 32 pixels, 0.011 for 24, 0.178 for 16."""


@cpu_by_default()
def train(
    data: str | Path | SceneDataset,
    out: str | Path,
    config: TrainConfig,
    *,
    device: str | None = None,
    accumulate: int = 1,
    checkpoint_seconds: float = 180,
    progress: bool = True,
) -> IterativeGenerator:
    """Train a generator, or go on with a run that was interrupted.

    The folder ``out`` gets ``log.jsonl``, ``checkpoint.safetensors`` (from which a run goes on to the very same numbers
    on the CPU), ``model/`` and ``discriminator/`` (the averaged generator and its opponent, for ``from_pretrained``),
    ``noise-encoder/`` where the configuration has a noise encoder (``compact``), and ``pictures/`` (drawings), all but
    the log anew with every checkpoint; and ``tensorboard/`` if it is installed. ``.lock`` keeps other runs out while
    this one lasts.

    In the processes that ``torchrun`` starts, or in those of a process group of ``torch.distributed``, all train one
    model: each takes its part of every step's scenes, and all together do, up to rounding, what one process would. Only
    the first one writes. A run may go on with another number of processes. See docs/scale.md.

    Args:
        data: packed file of ``condgan prepare``, or the folder that holds it; its train split is used. Or a data set of
            just the scenes to train on; resuming needs the same one.
        out: folder of the run.
        config: what to train; :data:`condgan.presets.PRESETS` holds some. A run from nothing on S scenes takes at most
            S - 1 of its ``light_components`` and ``light_inputs``, and warns where that is fewer.
        device: such as ``cuda``; None takes a GPU if there is one. Of several processes each takes a GPU of its own.
        accumulate: parts of a process's scenes that pass the networks one after the other, which takes less memory.
            Gradients are those of all parts, batch norm is over one part at a time.
        checkpoint_seconds: time between checkpoints.
        progress: show a progress bar on stderr.

    Returns:
        The averaged model, in eval mode. What the end of a run fits to it takes long, so of several processes only the
        first one does that: the others return at once, with the averaged weights as the last step left them.

    Raises:
        DatasetError: the data cannot be read.
        TypeError: ``config`` is no ``TrainConfig``.
        ValueError: ``out`` holds another run or one of other scenes, the data does not fit the configuration, or a step
            has fewer scenes than there are processes.
        TrainingDiverged: several steps in a row were not finite; the last checkpoint is good.
        BlockingIOError: another process trains in ``out``.
        OSError: ``out`` cannot be written; the last checkpoint is good.
        RankLost: another process of the run has gone; the last checkpoint is good.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written. After the last step,
            with that checkpoint written, both end the process at once.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config must be a TrainConfig, such as PRESETS['compact'] of condgan.presets, got {config!r}")
    out = Path(out)
    size = config.generator.image_size
    dataset = data if isinstance(data, SceneDataset) else SceneDataset(data, "train", image_size=size)
    _check_data(dataset, config)
    if not isinstance(data, SceneDataset) and dataset.checksum is not None:
        dataset.verify()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out: cannot make the folder {str(out)!r} ({error.strerror}): choose another") from None
    checkpoint = out / CHECKPOINT
    try:
        with contextlib.ExitStack() as held:
            with joined(device) as ranks:
                if ranks.leads:
                    _own_folder(out, held)
                    _warn_of_small_windows(dataset, config)
                config = _with_light_of(dataset, config, told=ranks.leads)
                _check_parts(config, ranks, accumulate)  # before the canvas is fitted
                verifier = _verifier(config, ranks.device)
                digests = learned_from(dataset, verifier)
                trainer = _ready_trainer(
                    dataset, checkpoint, digests, config, ranks, accumulate, verifier, progress and ranks.leads
                )
                _run(trainer, out, digests, checkpoint_seconds, progress)
            if not ranks.leads:
                return trainer.ema_generator
            generator = trainer.finish(progress)
            _save_models(trainer, generator, out)
    except (TrainingDiverged, RankLost) as error:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
        raise type(error)(f"{error}; {kept}") from error.__cause__
    return generator


def _own_folder(out: Path, held: contextlib.ExitStack) -> None:
    """Keep other runs out of a folder until ``held`` is closed, where its file system can.

    Raises:
        BlockingIOError: another process trains there.
        OSError: the folder cannot be written.
    """
    try:
        held.enter_context(locked(out / ".lock"))
    except BlockingIOError:
        raise BlockingIOError(
            f"out: another process trains in {str(out)!r}: wait for it, stop it, or choose another folder"
        ) from None


def _ready_trainer(
    dataset: SceneDataset,
    checkpoint: Path,
    digests: dict[str, str],
    config: TrainConfig,
    ranks: Ranks,
    accumulate: int,
    verifier: SceneClassifier | None,
    progress: bool,
) -> Trainer:
    """Before the first step, or where the checkpoint left off."""
    stored = read_checkpoint(checkpoint, config, digests) if checkpoint.exists() else None
    generator, discriminator, noise_encoder = _fresh_networks(config)
    if stored is None:
        _load_sources(config, generator, discriminator, noise_encoder)
    else:
        for name, buffer in generator.canvas.named_buffers():
            buffer.copy_(stored.tensors.get(f"generator.canvas.{name}", buffer))  # without it nothing is restored below
    fit_canvas = stored is None and config.init_generator is None
    scenes = TrainingScenes(dataset, generator, fit_canvas, progress=progress)
    for network in (generator, discriminator, noise_encoder):
        if network is not None:
            network.to(ranks.device)
    trainer = Trainer(config, scenes, generator, discriminator, noise_encoder, ranks, accumulate, verifier)
    if stored is not None:
        try:
            restore(trainer, stored)
        except (LookupError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{str(checkpoint)!r} lacks what this run needs ({reason:.200}): delete it to start the run again"
            ) from error
    ranks.check_same(len(scenes.pixels), "data: not every process sees the same number of scenes")
    ranks.check_same(trainer.step, f"out: not every process sees the same {str(checkpoint)!r}, share the folder")
    for trained in trainer.networks().values():
        ranks.copy_from_first(trained)  # what they computed for themselves may differ on machines that differ
    return trainer


def _run(trainer: Trainer, out: Path, digests: dict[str, str], checkpoint_seconds: float, progress: bool) -> None:
    """All steps that are left, and a checkpoint."""
    ranks, images = trainer.ranks, trainer.config.images
    with (
        _stop_requests() as stop_requests,
        RunLog(out, trainer.images) if ranks.leads else contextlib.nullcontext() as log,
        tqdm(
            total=images,
            initial=trainer.images,
            unit="img",
            desc=str(out),
            disable=not (progress and ranks.leads),
            smoothing=0.05,
        ) as bar,
    ):
        saved = time.monotonic()
        while trainer.images < images:
            before = trainer.images
            losses = trainer.train_step()
            bar.update(trainer.images - before)
            if log is not None:
                log.add(trainer.step, trainer.images, trainer.skipped, losses)
            if trainer.step % LOG_INTERVAL == 0:
                skipped = [f"skipped {trainer.skipped}"] if trainer.skipped else []
                bar.set_postfix_str(" ".join([f"{name} {value:.3f}" for name, value in losses.items()] + skipped))
            stopped = ranks.any(bool(stop_requests))  # in the same step on every rank
            if log is not None and (stopped or time.monotonic() - saved > checkpoint_seconds):
                log.write_line()  # first: a log may run ahead of the checkpoint, but not lack what led to it
                save_checkpoint(trainer, out / CHECKPOINT, digests)
                _save_models(trainer, trainer.export(), out)
                saved = time.monotonic()
            if stopped:
                ranks.any(False)  # torchrun ends those that still write when others have gone
                raise KeyboardInterrupt
        if log is not None:
            log.write_line()
            save_checkpoint(trainer, out / CHECKPOINT, digests)
        if ranks.any(bool(stop_requests)):  # all leave together; from here on no rank needs another
            raise KeyboardInterrupt


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C) and SIGTERM, which would break off in the middle of a step; main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, frame: received.append(number)) for number in signals]
    try:
        yield received
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)


def _fresh_networks(config: TrainConfig) -> tuple[IterativeGenerator, DiffDiscriminator, NoiseEncoder | None]:
    """The networks of a run with weights of its seed; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(fold_seed(config.seed))  # torch.manual_seed would reseed GPUs too
        generator, discriminator = IterativeGenerator(config.generator), DiffDiscriminator(config.discriminator)
        noise_encoder = None if config.noise_encoder is None else NoiseEncoder(config.noise_encoder)
    return generator, discriminator, noise_encoder


def _load_sources(
    config: TrainConfig,
    generator: IterativeGenerator,
    discriminator: DiffDiscriminator,
    noise_encoder: NoiseEncoder | None,
) -> None:
    """Give the networks the weights that ``init_generator`` and its like name."""
    networks = {"generator": generator, "discriminator": discriminator, "noise_encoder": noise_encoder}
    for name, network in networks.items():
        name = f"init_{name}"
        source = getattr(config, name)
        if source is None:
            continue
        if network is None:
            raise ValueError(f"{name}: {source!r} was given, but this run reconstructs nothing and has no such network")
        pretrained = type(network).from_pretrained(source)
        if pretrained.config != network.config:
            theirs, ours = dataclasses.asdict(pretrained.config), dataclasses.asdict(network.config)
            differing = [
                f"{key} is {theirs[key]!r} there and {value!r} in this run (--set)"
                for key, value in ours.items()
                if value != theirs[key]
            ]
            raise ValueError(f"{name}: {source!r} is of another architecture: {', '.join(differing)}")
        network.load_state_dict(pretrained.state_dict())
    if generator.correction is not None:
        generator.correction.clear_()  # measured for other weights: these are to do without, and it is measured anew


def _verifier(config: TrainConfig, device: torch.device) -> SceneClassifier | None:
    """The classifier whose word counts, if one's does."""
    if not config.legibility_weight:
        return None
    verifier = SceneClassifier.from_pretrained(config.verifier)
    ours, theirs = config.generator.objects, verifier.config.objects
    if theirs != ours:
        raise ValueError(
            f"verifier: {config.verifier!r} knows the objects {theirs}, the configuration names {ours}: name a "
            f"classifier of these (examples/train_classifier.py trains one), or set legibility_weight to 0"
        )
    if same_weights(verifier, SceneClassifier.from_pretrained("judge")):
        raise ValueError(
            f"verifier: {config.verifier!r} has the weights of the judge, which only reports: what it had a part in "
            "training it cannot judge; name another classifier, such as 'verifier'"
        )
    return verifier.to(device).eval()


def _check_parts(config: TrainConfig, ranks: Ranks, accumulate: int) -> None:
    """Refuse steps of too few scenes for so many ranks and parts, or for what normalises over the pictures of a part.

    That is the noise encoder; all ranks do it together.
    """
    smallest = min(part.size for part in own_parts(config.batch_scenes, ranks, accumulate))
    if config.noise_encoder is not None and ranks.count * smallest * config.generator.num_turns == 1:
        raise ValueError(
            f"batch_scenes is {config.batch_scenes}, too few: the noise encoder normalises over pictures that pass at "
            "once, of which there must be two; take more scenes a step, or fewer parts"
        )


def _check_data(dataset: SceneDataset, config: TrainConfig) -> None:
    """Refuse data that the configuration is not for, and say at once all that would have to be set."""
    if len(dataset) == 0:
        raise ValueError("data: the train split has no scenes")
    ours, names = config.generator, dataset.vocabulary.names
    size, turns = dataset.pixels.shape[-1], dataset.objects.shape[1]
    differing: list[str] = []
    settings: dict[str, Any] = {}
    if size != ours.image_size:
        differing.append(
            f"pictures are {size} pixels wide, the configuration asks for {ours.image_size} (which "
            f"`condgan prepare DATA_DIR --image-size {ours.image_size}` makes of them)"
        )
        if size not in IMAGE_SIZES:
            raise ValueError(f"data: {differing[0]}; prepare them in a size that models have, {IMAGE_SIZES}")
        settings |= {"generator.image_size": size, "discriminator.image_size": size}
        if ours.window is not None:
            window = min(size, 8 * math.ceil(ours.window * size / ours.image_size / 8))
            settings |= {"generator.window": window, "discriminator.window": window}
    if names != ours.objects:
        differing.append(f"its objects are {names}, the configuration names {ours.objects}")
        settings |= {"generator.objects": ",".join(names), "discriminator.objects": ",".join(names)}
        if config.legibility_weight and config.verifier == TrainConfig.verifier:
            settings["legibility_weight"] = 0  # no word of a verifier that knows other objects
    if turns != ours.num_turns:
        differing.append(f"its scenes have {turns} turns, generator.num_turns is {ours.num_turns}")
        settings["generator.num_turns"] = turns
    if differing:
        given = " ".join(f"--set {shlex.quote(f'{field}={value}')}" for field, value in settings.items())
        raise ValueError(f"data: {'; '.join(differing)}. To train a model of such scenes give {given}")


def _warn_of_small_windows(dataset: SceneDataset, config: TrainConfig) -> None:
    """Say if objects are larger than what a turn may change; seen in turns after the first, of some of the scenes."""
    size, window = config.generator.image_size, config.generator.window
    if window is None or dataset.objects.shape[1] == 1:
        return
    some = from_uint8(dataset.pixels[:WINDOWED_SCENES])
    before, after = some[:, :-1].flatten(0, 1), some[:, 1:].flatten(0, 1)
    changed = changed_region(before, after)
    corners = window_corners(place_of_change(before, after).nan_to_num((size - 1) / 2), size, window)
    outside = paste(changed[:, None].float(), torch.zeros(len(changed), 1, window, window), corners)
    share = float(outside.sum() / changed.sum().clamp(min=1))
    if share > OUTSIDE_WINDOWS:
        warnings.warn(
            f"data: {share:.0%} of what turns change lies outside of the windows of {window} pixels around the "
            f"objects, where the model cannot draw: give larger ones, multiples of 8 up to {size}, such as --set "
            f"generator.window={size} --set discriminator.window={size}",
            stacklevel=4,
        )


def _with_light_of(dataset: SceneDataset, config: TrainConfig, told: bool) -> TrainConfig:
    """The config with no more light than a fresh canvas can learn from these scenes; ``told``: warn if it has less.

    S scenes differ in S - 1 directions. When the run goes on, its config becomes the same again.
    """
    most, asked = len(dataset) - 1, config.generator
    if asked.light_components <= most or config.init_generator is not None:
        return config
    inputs = min(asked.light_inputs, most)
    if told:
        warnings.warn(
            f"data: generator.light_components={asked.light_components} ways of lighting cannot be learned from so few "
            f"scenes, {len(dataset)} in the train split: this run has light_components={most} and "
            f"light_inputs={inputs}, which the trained model will say of itself; prepare more scenes for more",
            stacklevel=4,
        )
    return dataclasses.replace(
        config,
        generator=dataclasses.replace(asked, light_components=most, light_inputs=inputs),
        discriminator=dataclasses.replace(config.discriminator, light_inputs=inputs),
    )


def _save_models(trainer: Trainer, generator: IterativeGenerator, out: Path) -> None:
    """What the run has come to, and a sheet of drawings."""
    generator.save_pretrained(out / "model")
    trainer.discriminator.save_pretrained(out / "discriminator")
    if trainer.noise_encoder is not None:
        trainer.noise_encoder.save_pretrained(out / "noise-encoder")
    names = [[trainer.scenes.names[i] for i in row] for row in trainer.scenes.objects[:24].tolist()]
    sheet = Drawing(names, list(range(len(names))), None, draw_turns(generator, names, range(len(names))).images)
    (out / "pictures").mkdir(exist_ok=True)
    sheet.grid(columns=6).save(out / "pictures" / f"{trainer.images:09d}.png")
