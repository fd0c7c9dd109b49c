"""runs.py: exact resuming, what a run leaves, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import RUN, make_trainer

from condgan import DiffDiscriminator, IterativeGenerator, checkpoints, runs
from condgan.checkpoints import CHECKPOINT, COUNTERS, learned_from, save_checkpoint
from condgan.classifier import SceneClassifier, SceneClassifierConfig
from condgan.datasets import DatasetError, SceneDataset, packed_path
from condgan.files import file_sha256
from condgan.models import NoiseEncoder
from condgan.prepare import prepare
from condgan.presets import PRESETS, with_fields
from condgan.ranks import ALONE, Ranks
from condgan.runs import train
from condgan.training import Trainer, TrainingDiverged
from condgan.vocab import ICLEVR_OBJECTS, Vocabulary


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / CHECKPOINT)


def log_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_goes_on_to_the_very_same_numbers(data: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, resume, compare bit for bit with a run that nobody disturbed."""
    config = dataclasses.replace(RUN, images=360, reconstruction_images=90)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "import dataclasses\n"
        "from condgan import runs\n"
        "from tiny import RUN, shorten_fits\n"
        "shorten_fits()\n"
        "config = dataclasses.replace(RUN, images=360, reconstruction_images=90)\n"
        "seconds = float(sys.argv[3])\n"
        "runs.train(sys.argv[1], sys.argv[2], config, device='cpu', checkpoint_seconds=seconds, progress=False)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), str(data), str(tmp_path / "killed")]
    process = subprocess.Popen([*command, "1"], env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / CHECKPOINT).exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with safe_open(tmp_path / "killed" / CHECKPOINT, "pt") as file:
        reached = json.loads(file.metadata()["counters"])["images"]
    assert 0 < reached < config.images
    assert subprocess.run([*command, "600"], env=environment).returncode == 0
    train(data, tmp_path / "whole", config, device="cpu", progress=False)

    killed, whole = tensors(tmp_path / "killed"), tensors(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert {"noise_encoder.linear.weight", "noise_encoder.norm.running_var"} <= whole.keys()
    assert [name for name in whole if not torch.equal(killed[name], whole[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed/log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no step is in two lines"
    assert {20, 40, reached // 9} <= set(steps), "a checkpoint has a line of its own"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_its_step_first(
    number: signal.Signals, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = Trainer._optimize

    def stop_in_the_middle(trainer: Trainer, losses: torch.Tensor) -> torch.Tensor:
        losses = optimize(trainer, losses)
        if trainer.step == 5:  # of the adversarial stage, before the averaged weights and the counters hear of it
            os.kill(os.getpid(), number)
        return losses

    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_optimize", stop_in_the_middle)
        train(data, tmp_path / "stopped", RUN, device="cpu", progress=False)
    assert signal.getsignal(number) is before
    with safe_open(tmp_path / "stopped" / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["counters"])["step"] == 6
    train(data, tmp_path / "stopped", RUN, device="cpu", progress=False)
    train(data, tmp_path / "whole", RUN, device="cpu", progress=False)
    stopped, whole = tensors(tmp_path / "stopped"), tensors(tmp_path / "whole")
    assert [name for name in whole if not torch.equal(stopped[name], whole[name])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_step_is_heard(
    number: signal.Signals, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, before, short = save_checkpoint, signal.getsignal(number), dataclasses.replace(RUN, images=9)

    def stop_while_it_is_saved(trainer: Trainer, path: Path, scenes: str) -> None:
        save(trainer, path, scenes)
        os.kill(os.getpid(), number)

    def stop_while_it_is_finished(trainer: Trainer, progress: bool) -> IterativeGenerator:
        assert signal.getsignal(number) is before
        assert (tmp_path / CHECKPOINT).exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "save_checkpoint", stop_while_it_is_saved)
        patch.setattr(Trainer, "finish", None)  # it is not called
        train(data, tmp_path, short, device="cpu", progress=False)
    monkeypatch.setattr(Trainer, "finish", stop_while_it_is_finished)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path, short, device="cpu", progress=False)


def test_a_run_can_be_lengthened_but_not_changed(data: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(RUN, images=18)
    train(data, tmp_path, short, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"another run: lr_generator was 0\.0001 and is 0\.5"):
        train(data, tmp_path, dataclasses.replace(short, lr_generator=0.5), device="cpu", progress=False)
    train(data, tmp_path, dataclasses.replace(short, images=26), device="cpu", progress=False)
    train(data, tmp_path, dataclasses.replace(short, images=26), device="cpu", progress=False)  # 27 is where it stops
    with pytest.raises(ValueError, match=r"has seen 27 pictures, more than images=18: ask for as many or more, or"):
        train(data, tmp_path, short, device="cpu", progress=False)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["counters"])["images"] == 27
        assert json.loads(file.metadata()["config"])["images"] == 26


def test_two_runs_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(RUN, images=9, reconstruction_images=0, reconstruction_weight=0.0)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match=f"out: another process trains in '{tmp_path}': wait for it, stop it, or"),
    ):
        train(data, tmp_path, short, device="cpu", progress=False)
    assert not (tmp_path / CHECKPOINT).exists()
    train(data, tmp_path, short, device="cpu", progress=False)
    with FileLock(tmp_path / ".lock", timeout=0):
        assert (tmp_path / CHECKPOINT).exists()


def test_a_file_system_without_locks_is_trained_on_all_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    short = dataclasses.replace(RUN, images=9, reconstruction_images=0, reconstruction_weight=0.0)
    train(data, tmp_path, short, device="cpu", progress=False)
    assert (tmp_path / CHECKPOINT).exists()


def test_fresh_networks_have_weights_of_all_bits_of_their_seed_and_leave_random_state_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def weights(seed: int) -> torch.Tensor:
        networks = runs._fresh_networks(dataclasses.replace(RUN, seed=seed))
        return torch.cat([weight.flatten() for network in networks if network for weight in network.parameters()])

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        generator = IterativeGenerator(RUN.generator)
    expected = torch.cat([weight.flatten() for weight in generator.parameters()])
    before, reseeded = torch.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    assert torch.equal(weights(7)[: len(expected)], expected)
    assert torch.equal(weights(7), weights(7))
    assert not torch.equal(weights(7), weights(7 + 2**32))
    assert not torch.equal(weights(7 + 2**32), weights(7 + 2**33))
    assert torch.equal(torch.get_rng_state(), before)
    assert reseeded == [], "nor is that of GPUs reset"


def scenes_of(vocabulary: Vocabulary, turns: int, image_size: int) -> SceneDataset:
    """Scenes as a data set holds them, of which nothing is read but what they are."""
    scenes = SceneDataset.__new__(SceneDataset)  # no file
    scenes.names, scenes.vocabulary = ["scene"], vocabulary
    scenes.objects = torch.zeros(1, turns, dtype=torch.long)
    scenes.pixels = torch.zeros(1, turns, 3, image_size, image_size, dtype=torch.uint8)
    return scenes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("names", "turns", "size"),
    [(ICLEVR_OBJECTS, 3, 128), (ICLEVR_OBJECTS, 2, 64), (("big dog", "cat"), 3, 64), (("big dog", "cat"), 5, 32)],
)
def test_other_data_are_refused_with_all_that_has_to_be_set(
    preset: str, names: tuple[str, ...], turns: int, size: int, tmp_path: Path
) -> None:
    scenes = scenes_of(Vocabulary(names), turns, size)
    with pytest.raises(ValueError, match=r"^data: .* To train a model of such scenes give --set") as caught:
        train(scenes, tmp_path / "run", PRESETS[preset], device="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    words = shlex.split(str(caught.value).partition(" scenes give ")[2])
    assert {*words[::2]} == {"--set"}
    config = with_fields(PRESETS[preset], words[1::2])
    runs._check_data(scenes, config)
    assert (config.generator.objects, config.generator.num_turns, config.generator.image_size) == (names, turns, size)
    assert config.generator.window == (PRESETS[preset].generator.window and {32: 24, 64: 40, 128: 80}[size])
    assert runs._verifier(config, torch.device("cpu")) is None or names == ICLEVR_OBJECTS


@pytest.mark.parametrize(("window", "told"), [(None, False), (16, True), (48, False)])
def test_windows_that_objects_do_not_fit_into_are_told(
    window: int | None, told: bool, data: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def windowed(config: Any) -> Any:
        return dataclasses.replace(config, places=True, window=window)

    config = dataclasses.replace(RUN, generator=windowed(RUN.generator), discriminator=windowed(RUN.discriminator))
    runs._warn_of_small_windows(SceneDataset(data, "train"), config)
    assert len(recwarn) == told
    if told:
        assert re.search(r"data: \d+% of what turns change lies outside .* windows of 16 pix", str(recwarn[0].message))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"accumulate": 4}, "batch_scenes is 3, too few for 1 ranks with 4 parts each"),
        ({}, {"accumulate": 1.5}, "accumulate must be a whole number, got 1.5"),
        ({"legibility_weight": 1.0, "verifier": "nosuch"}, {}, "nosuch"),
    ],
)
def test_what_is_wrong_is_refused_before_the_light_is_learned(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    options: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(runs, "TrainingScenes", None)  # it is not called
    config = dataclasses.replace(RUN, **changes)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        train(data, tmp_path, config, device="cpu", progress=False, **options)


@pytest.mark.parametrize(("scenes", "accumulate", "fits"), [(1, 1, False), (3, 2, False), (2, 1, True), (4, 2, True)])
def test_a_single_picture_cannot_be_normalised(scenes: int, accumulate: int, fits: bool) -> None:
    config = dataclasses.replace(RUN, batch_scenes=scenes, generator=dataclasses.replace(RUN.generator, num_turns=1))
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(ValueError, match=r"^batch_scenes is \d, too few: the noise")
    ):
        runs._check_parts(config, ALONE, accumulate)
    one_turn = dataclasses.replace(PRESETS["reference"].generator, num_turns=1)
    without = dataclasses.replace(PRESETS["reference"], batch_scenes=scenes, generator=one_turn)
    runs._check_parts(without, ALONE, accumulate)
    runs._check_parts(dataclasses.replace(config, batch_scenes=2), Ranks(0, 2), 1)


def test_a_run_leaves_a_model_a_log_and_pictures(data: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    generator = train(data, tmp_path, RUN, device="cpu", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = IterativeGenerator.from_pretrained(tmp_path / "model")
    scene = ["red cube", "blue sphere"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), generator.buffers(), strict=True))
    drawn = generator.generate(scene, seed=1).tensor  # in channels_last, hence not the very same bits
    torch.testing.assert_close(loaded.generate(scene, seed=1).tensor, drawn, rtol=0, atol=1e-5)
    encoder, stored = NoiseEncoder.from_pretrained(tmp_path / "noise-encoder"), tensors(tmp_path)
    assert encoder.config == RUN.noise_encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, stored[f"noise_encoder.{name}"]), name
    assert encoder.norm.num_batches_tracked == 4  # only the first stage trains it
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["000000072.png"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_takes_a_data_set_as_it_takes_its_file(data: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(RUN, images=9)
    scenes = SceneDataset(data, "train")
    left_out = scenes.vocabulary.names[int(scenes.objects[0, 0])]
    sources = {"file": data, "scenes": scenes, "fewer": scenes.without([left_out])}
    for name, source in sources.items():
        train(source, tmp_path / name, short, device="cpu", progress=False)
    file, same, fewer = (tensors(tmp_path / name) for name in sources)
    assert all(torch.equal(file[name], same[name]) for name in file)
    assert not torch.equal(file["generator.l0.weight"], fewer["generator.l0.weight"])


def test_a_run_does_not_go_on_with_other_scenes(data: Path, tmp_path: Path) -> None:
    short, longer = (dataclasses.replace(RUN, images=images) for images in (9, 18))
    scenes = SceneDataset(data, "train")
    left_out = scenes.vocabulary.names[int(scenes.objects[0, 0])]
    train(data, tmp_path, short, device="cpu", progress=False)
    with pytest.raises(
        ValueError, match=rf"data: the run in '{tmp_path}' was trained on other scenes .*--out\), or give"
    ):
        train(scenes.without([left_out]), tmp_path, longer, device="cpu", progress=False)
    train(scenes.without([]), tmp_path, longer, device="cpu", progress=False)


def copied(data: Path, folder: Path, change: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels) -> Path:
    """A packed file with its index, in a folder of its own; ``change`` does not reach the index."""
    folder.mkdir()
    shutil.copy(data.with_suffix(".json"), folder)
    np.save(folder / data.name, change(np.load(data)))
    return folder / data.name


def test_damaged_data_is_not_trained_on(data: Path, tmp_path: Path) -> None:
    broken = copied(data, tmp_path / "data", lambda pixels: pixels // 2)
    with pytest.raises(DatasetError, match="differs from its checksum, it is damaged"):
        train(broken, tmp_path / "run", RUN, device="cpu", progress=False)


def test_a_run_does_not_go_on_with_other_pictures(data: Path, tmp_path: Path) -> None:
    short, longer = (dataclasses.replace(RUN, images=images) for images in (9, 18))
    other = copied(data, tmp_path / "data", lambda pixels: pixels[::-1])
    other.with_suffix(".json").write_text(
        json.dumps(json.loads(data.with_suffix(".json").read_text()) | {"sha256": file_sha256(other)})
    )
    train(data, tmp_path / "run", short, device="cpu", progress=False)
    with pytest.raises(ValueError, match="was trained on other pictures of these scenes"):
        train(other, tmp_path / "run", longer, device="cpu", progress=False)
    train(copied(data, tmp_path / "same"), tmp_path / "run", longer, device="cpu", progress=False)


def test_a_run_does_not_go_on_with_another_verifier_and_never_listens_to_the_judge(data: Path, tmp_path: Path) -> None:
    verifier = tmp_path / "verifier"
    classifier = SceneClassifier(SceneClassifierConfig((4,), (1,), "small"))
    classifier.save_pretrained(verifier)
    short = dataclasses.replace(RUN, images=9, verifier=str(verifier), legibility_weight=1.0)
    train(data, tmp_path / "run", short, device="cpu", progress=False)
    torch.nn.init.zeros_(classifier.fc.weight)
    classifier.save_pretrained(verifier)
    longer = dataclasses.replace(short, images=18)
    with pytest.raises(ValueError, match=r"verifier: the run in .* listened to another verifier"):
        train(data, tmp_path / "run", longer, device="cpu", progress=False)
    SceneClassifier.from_pretrained("judge").save_pretrained(tmp_path / "copy")
    for name in ("judge", str(tmp_path / "copy")):
        with pytest.raises(ValueError, match=f"verifier: '{name}' has the weights of the judge"):
            train(data, tmp_path / "other", dataclasses.replace(short, verifier=name), device="cpu", progress=False)


def test_a_checkpoint_that_does_not_name_its_scenes_goes_on_and_then_does(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, dataclasses.replace(RUN, images=9), device="cpu", progress=False)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    scenes = metadata.pop("scenes")
    save_file(tensors(tmp_path), tmp_path / CHECKPOINT, metadata)
    train(data, tmp_path, dataclasses.replace(RUN, images=18), device="cpu", progress=False)
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert file.metadata()["scenes"] == scenes


def test_the_digest_of_scenes_is_that_of_names_objects_and_vocabulary(data: Path) -> None:
    whole = SceneDataset(data, "train")

    def digest(dataset: SceneDataset) -> str:
        return learned_from(dataset, None)["scenes"]

    changed = [copy.copy(whole) for _ in range(4)]
    changed[0].names = [*whole.names[1:], whole.names[0]]
    changed[1].objects = whole.objects.flip(1)
    changed[2].vocabulary = Vocabulary(whole.vocabulary.names[::-1])
    changed[3].pixels = whole.pixels.flip(0)
    assert len(digest(whole)) == 64
    assert digest(whole) == digest(SceneDataset(data, "train")) == digest(changed[3])
    others = [*changed[:3], SceneDataset(data), SceneDataset(data, "train", half=0), whole.without(["red cube"])]
    assert len({digest(scenes) for scenes in (whole, *others)}) == 1 + len(others)


def test_a_diverged_run_names_its_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_reconstruction_errors", lambda self, fake, batch: fake.sum((1, 2, 3)) / 0)
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(data, tmp_path, dataclasses.replace(RUN, reconstruction_images=1000), device="cpu", progress=False)
    (line,) = log_lines(tmp_path)
    assert line["skipped"] == line["step"] > 0, "what led to it is in the log"


def test_the_log_of_a_run_that_goes_on_has_every_step_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step 6, then killed after step 20, before the next checkpoint."""
    config = dataclasses.replace(RUN, images=234)
    optimize = Trainer._optimize

    def stop(trainer: Trainer, losses: torch.Tensor) -> torch.Tensor:
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return optimize(trainer, losses)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_optimize", stop)
        train(data, tmp_path / "run", config, device="cpu", progress=False)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [6]
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "images": 180, "gap": 1e9}) + "\n" + '{"step": 2')
    train(data, tmp_path / "run", config, device="cpu", progress=False)
    train(data, tmp_path / "whole", config, device="cpu", progress=False)
    run, whole = log_lines(tmp_path / "run"), log_lines(tmp_path / "whole")
    assert [line["step"] for line in run] == [6, 20, 26]
    assert [line["step"] for line in whole] == [20, 26]
    assert run[-1].items() - whole[-1].items() == {("images_per_second", run[-1]["images_per_second"])}


def test_a_timed_checkpoint_has_its_line_before_it_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after it then leaves no gap, and one before it drops the line when the run goes on."""
    found = []

    def killed(trainer: Trainer, path: Path, scenes: str) -> None:
        found.append((trainer.step, log_lines(tmp_path)))
        raise InterruptedError

    monkeypatch.setattr(runs, "save_checkpoint", killed)
    with pytest.raises(InterruptedError):
        train(data, tmp_path, RUN, device="cpu", checkpoint_seconds=0, progress=False)
    ((step, lines),) = found
    assert step == 1
    assert [line["step"] for line in lines] == [1]


def test_data_of_another_size_is_refused(data: Path, tmp_path: Path) -> None:
    generator, discriminator = (dataclasses.replace(c, image_size=128) for c in (RUN.generator, RUN.discriminator))
    large = dataclasses.replace(RUN, generator=generator, discriminator=discriminator)
    with pytest.raises(ValueError, match=r"condgan prepare DATA_DIR --image-size 128"):
        train(data, tmp_path, large, device="cpu", progress=False)


def test_of_a_folder_with_data_of_two_sizes_that_of_the_run_is_taken(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare(data.parent, out=packed_path(folder, 32), image_size=32, progress=False)
    for name in (data.name, data.with_suffix(".json").name):
        shutil.copy(data.parent / name, folder)
    generator, discriminator = (dataclasses.replace(c, image_size=32) for c in (RUN.generator, RUN.discriminator))
    small = dataclasses.replace(RUN, generator=generator, discriminator=discriminator, images=RUN.batch_scenes * 3)
    assert train(folder, tmp_path / "run", small, device="cpu", progress=False).image_size == 32


def test_the_name_of_a_preset_is_no_configuration(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"config must be a TrainConfig, such as PRESETS\['compact'\].*, got 'compact'"):
        train(data, tmp_path / "run", "compact", device="cpu", progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(data, tmp_path, dataclasses.replace(RUN, images=9), device="cpu", progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"as far as it went")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        OSError, match=r"out: cannot write '.*safetensors' \(.*No space left.*\): make room and run the"
    ):
        train(data, tmp_path, dataclasses.replace(RUN, images=18), device="cpu", progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def first_scenes(data: Path, count: int) -> SceneDataset:
    scenes = copy.copy(SceneDataset(data, "train"))
    scenes.names, scenes.objects, scenes.pixels = scenes.names[:count], scenes.objects[:count], scenes.pixels[:count]
    return scenes


@pytest.mark.parametrize("count", [1, 3])
def test_few_scenes_lower_the_light_of_a_run_from_nothing(count: int, data: Path, tmp_path: Path) -> None:
    few, most = first_scenes(data, count), count - 1
    lower = rf"=5 ways .* so few scenes, {count} in .* light_components={most} and light_inputs={most}, which"
    config = dataclasses.replace(
        RUN,
        images=9,
        generator=dataclasses.replace(RUN.generator, light_components=5, light_inputs=4),
        discriminator=dataclasses.replace(RUN.discriminator, light_inputs=4),
    )
    with pytest.warns(UserWarning, match=lower) as told:
        trained = train(few, tmp_path, config, device="cpu", progress=False)
    assert [warning.filename for warning in told] == [__file__]
    assert all(weight.isfinite().all() for weight in trained.state_dict().values())
    saved = IterativeGenerator.from_pretrained(tmp_path / "model").config
    assert saved == trained.config == dataclasses.replace(config.generator, light_components=most, light_inputs=most)
    assert DiffDiscriminator.from_pretrained(tmp_path / "discriminator").config.light_inputs == most
    with pytest.warns(UserWarning, match=lower):
        train(few, tmp_path, dataclasses.replace(config, images=18), device="cpu", progress=False)  # goes on
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["counters"])["images"] == 18
    assert json.loads(metadata["config"])["generator"]["light_components"] == most
    with pytest.raises(ValueError, match="trained on other scenes than these"):  # which have more light
        train(data, tmp_path, config, device="cpu", progress=False)


def test_light_is_lowered_only_where_it_has_to_be_learned_and_cannot_be(data: Path) -> None:
    config = dataclasses.replace(RUN, generator=dataclasses.replace(RUN.generator, light_components=5))
    few, trained = first_scenes(data, 5), dataclasses.replace(config, init_generator="iclevr-64")
    assert runs._with_light_of(first_scenes(data, 6), config, told=True) is config
    assert runs._with_light_of(few, trained, told=True) is trained
    with pytest.warns(UserWarning, match="light_components=4 and light_inputs=2"):
        lowered = runs._with_light_of(few, config, told=True)
    assert runs._with_light_of(few, config, told=False) == lowered


@pytest.mark.filterwarnings("ignore:data. .* lies outside of the windows")
def test_pictures_without_a_floor_train_with_what_the_error_says(data: Path, tmp_path: Path) -> None:
    noise = copy.copy(SceneDataset(data, "train"))
    rng = torch.Generator().manual_seed(0)
    noise.pixels = torch.randint(256, noise.pixels.shape, dtype=torch.uint8, generator=rng)
    short = dataclasses.replace(RUN, images=9)
    with pytest.raises(ValueError, match="no empty floor") as caught:
        train(noise, tmp_path, short, device="cpu", progress=False)
    settings = re.findall(r"--set ([^ `]+)", str(caught.value))
    assert with_fields(PRESETS["compact"], settings).generator.light_inputs == 0, "they fit the default preset too"
    train(noise, tmp_path, with_fields(short, settings), device="cpu", progress=False)
    assert IterativeGenerator.from_pretrained(tmp_path / "model").config.light_components == 0


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CHECKPOINT).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=rf"out: .*{CHECKPOINT}' is there, but you may not read it: change its"):
        train(data, tmp_path, RUN, device="cpu", progress=False)


def test_a_damaged_checkpoint_or_a_file_for_a_folder_says_what_to_do(data: Path, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINT).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"is damaged .* delete it to start the run again"):
        train(data, tmp_path, RUN, device="cpu", progress=False)
    save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT}' does not say of which run it is: delete it to start"):
        train(data, tmp_path, RUN, device="cpu", progress=False)
    whole = dict.fromkeys(COUNTERS, 0)
    for config, counters in (({"images": 9}, {}), ([], whole), ({}, whole), ({"images": 9}, whole | {"train_step": 1})):
        metadata = {"config": json.dumps(config), "counters": json.dumps(counters)}
        save_file({"x": torch.zeros(1)}, tmp_path / CHECKPOINT, metadata)
        with pytest.raises(ValueError, match="does not say of which run it is: delete it to start"):
            train(data, tmp_path, RUN, device="cpu", progress=False)
    with pytest.raises(OSError, match="out: cannot make the folder"):
        train(data, tmp_path / CHECKPOINT, RUN, device="cpu", progress=False)


def test_a_run_that_reconstructs_nothing_has_no_noise_encoder(data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(RUN, images=9, reconstruction_images=0, reconstruction_weight=0.0)
    assert config.noise_encoder is None
    train(data, tmp_path / "run", config, device="cpu", progress=False)
    assert not (tmp_path / "run/noise-encoder").exists()
    assert not [name for name in tensors(tmp_path / "run") if "noise_encoder" in name]
    with pytest.raises(ValueError, match="init_noise_encoder: 'some/where' was given, but this run reconstructs noth"):
        train(data, tmp_path / "other", dataclasses.replace(config, init_noise_encoder="some/where"), progress=False)


@pytest.mark.parametrize("reconstruction_weight", [0.0, 1.0])
def test_the_first_stage_trains_the_noise_encoder_and_settles_what_codes_mean(
    data: Path, tmp_path: Path, reconstruction_weight: float
) -> None:
    config = dataclasses.replace(RUN, images=36, reconstruction_images=18, reconstruction_weight=reconstruction_weight)
    assert config.noise_encoder is not None
    for name in ("image_size", "z_dim", "places", "window"):
        assert getattr(config.noise_encoder, name) == getattr(config.generator, name)
    train(data, tmp_path, config, device="cpu", progress=False)
    encoder = NoiseEncoder.from_pretrained(tmp_path / "noise-encoder")
    assert encoder.norm.num_batches_tracked == 2
    train(data, tmp_path / "first", dataclasses.replace(config, images=18), device="cpu", progress=False)
    settled = NoiseEncoder.from_pretrained(tmp_path / "first/noise-encoder")
    assert all(torch.equal(a, b) for a, b in zip(settled.parameters(), encoder.parameters(), strict=True))
    steps = {name: value for name, value in tensors(tmp_path).items() if name.endswith(".step")}
    assert {name.split(".")[1] for name in steps} >= {"generator", "encoder", "discriminator"}


def test_a_run_can_start_from_trained_networks(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "first", dataclasses.replace(RUN, images=18), device="cpu", progress=False)
    config = dataclasses.replace(
        RUN,
        images=9,
        lr_reconstruction=0.0,
        init_generator=str(tmp_path / "first/model"),
        init_discriminator=str(tmp_path / "first/discriminator"),
        init_noise_encoder=str(tmp_path / "first/noise-encoder"),
    )
    train(data, tmp_path / "second", config, device="cpu", progress=False)
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    train(data, tmp_path / "second", config, device="cpu", progress=False)  # goes on without them
    (tmp_path / "elsewhere").rename(tmp_path / "first")
    first, second = (IterativeGenerator.from_pretrained(tmp_path / run / "model") for run in ("first", "second"))
    weights = dict(second.named_parameters())
    for name, weight in first.named_parameters():
        fitted_once_more = name.startswith(("mapping.", "place_model."))  # at the end of every run
        if name != "place_model.conv5.bias":  # the same for all cells, of which only differences count
            assert fitted_once_more != torch.equal(weight, weights[name]), name
    trained = {key: value for key, value in tensors(tmp_path / "second").items() if "generator.correction." in key}
    assert first.correction is not None and first.correction.offsets.any(), "what the first run measured at its end"
    assert not any(value.any() for key, value in trained.items() if key.endswith((".offsets", ".responses"))), (
        "is not there while others learn"
    )
    encoders = [NoiseEncoder.from_pretrained(tmp_path / run / "noise-encoder") for run in ("first", "second")]
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in encoders), strict=True))
    assert [int(encoder.norm.num_batches_tracked) for encoder in encoders] == [2, 3]
    longer = dataclasses.replace(RUN.generator, z_dim=5)
    other = dataclasses.replace(RUN, generator=longer, init_noise_encoder=config.init_noise_encoder)
    with pytest.raises(
        ValueError, match=r"init_noise_encoder: .* of another architecture: z_dim is 4 there and 5 in this run"
    ):
        train(data, tmp_path / "third", other, device="cpu", progress=False)
    with pytest.raises(ValueError, match=r"init_generator: .* of another architecture: "):
        train(data, tmp_path / "third", dataclasses.replace(PRESETS["compact"], init_generator=config.init_generator))


def test_without_legibility_weight_no_verifier_is_asked_for(data: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(RUN, images=9, verifier="nowhere")
    train(data, tmp_path / "run", config, device="cpu", progress=False)
    with pytest.raises(ValueError, match="'nowhere'"):
        train(data, tmp_path / "told", dataclasses.replace(config, legibility_weight=1.0), device="cpu", progress=False)


def test_a_verifier_of_other_objects_is_refused_before_the_run(data: Path, tmp_path: Path) -> None:
    classifier = SceneClassifier(SceneClassifierConfig((4,), (1,), "small", objects=("red cube",)))
    classifier.save_pretrained(tmp_path / "classifier")
    config = dataclasses.replace(RUN, verifier=str(tmp_path / "classifier"), legibility_weight=1.0)
    with pytest.raises(ValueError, match=r"verifier: '.*classifier' knows the objects \('red cube',\), the conf"):
        train(data, tmp_path / "run", config, device="cpu", progress=False)


def test_who_can_read_other_files_can_read_a_checkpoint(data: Path, tmp_path: Path) -> None:
    save_checkpoint(make_trainer(data), tmp_path / CHECKPOINT, {})
    (tmp_path / "other").touch()
    assert (tmp_path / CHECKPOINT).stat().st_mode == (tmp_path / "other").stat().st_mode
