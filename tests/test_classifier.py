"""classifier.py: torchvision's resnet18 by default, evidence pooling by its formula, and no code from a pickle."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from condgan import CheckpointError, SceneClassifier, SceneClassifierConfig
from condgan.vocab import ICLEVR_OBJECTS

SMALL = SceneClassifierConfig(widths=(8, 12, 16), blocks=(1, 2, 1), stem="small", pooling="evidence")


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with statistics and affine weights that are not those of a fresh one, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.add_(torch.rand(tensor.shape, generator=rng))
    return model.eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(torchvision.models.resnet18(weights=None, num_classes=24))


@pytest.fixture(scope="module")
def classifier() -> SceneClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = SceneClassifier(SMALL)
    perturbed(model)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


# The network


def test_the_default_is_torchvisions_resnet18(resnet: nn.Module, images: Tensor) -> None:
    classifier = SceneClassifier().eval()
    assert list(classifier.state_dict()) == list(resnet.state_dict()), "the names are for ever"
    classifier.load_state_dict(resnet.state_dict())
    with torch.no_grad():
        logits, wanted = classifier(images), resnet(images)
        assert torch.equal(logits, wanted)
        pooled: list[Tensor] = []
        resnet.avgpool.register_forward_hook(lambda _module, _inputs, output: pooled.append(output))
        resnet(images)
        torch.testing.assert_close(classifier.features(images), pooled[0].flatten(1), rtol=0, atol=1e-5)


def test_evidence_is_pooled_by_log_sum_exp_over_cells(classifier: SceneClassifier, images: Tensor) -> None:
    with torch.no_grad():
        cells = classifier.feature_map(images)
        assert cells.shape == (5, 8, 8, 16)
        wanted = torch.zeros(5, 24, dtype=torch.float64)
        for n in range(5):
            for row in range(8):
                for column in range(8):
                    wanted[n] += classifier.fc(cells[n, row, column]).double().exp()
        torch.testing.assert_close(classifier(images).double(), wanted.log(), rtol=0, atol=1e-4)


def test_one_strong_cell_is_enough_for_evidence_and_not_for_an_average() -> None:
    logits = {}
    for pooling in ("evidence", "average"):
        model = SceneClassifier(SceneClassifierConfig((4,), (1,), "small", pooling, ("red cube",)))
        nn.init.ones_(model.fc.weight)
        nn.init.zeros_(model.fc.bias)
        cells = torch.zeros(1, 4, 4, 4)
        cells[0, 2, 1] = 5.0
        model.feature_map = lambda _, cells=cells: cells
        logits[pooling] = model(torch.zeros(1, 3, 8, 8)).item()
    assert logits["evidence"] == pytest.approx(20, abs=1e-4)
    assert logits["average"] == pytest.approx(20 / 16)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("pooling", ["average", "evidence"])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 64), (2, 33, 50), (3, 9, 9)])
def test_any_size_of_picture_gives_a_logit_an_object(stem: Any, pooling: Any, n: int, height: int, width: int) -> None:
    config = SceneClassifierConfig((4, 6), (1, 1), stem, pooling, ("red cube", "blue sphere", "a"))
    model = SceneClassifier(config)
    logits = model(torch.randn(n, 3, height, width))
    assert logits.shape == (n, 3)
    cells = model.eval().feature_map(torch.randn(n, 3, height, width))
    scale = 8 if stem == "imagenet" else 4
    assert cells.shape == (n, -(-height // scale), -(-width // scale), 6)


def test_pictures_are_seen_in_the_size_that_was_trained(classifier: SceneClassifier, images: Tensor) -> None:
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)  # i-CLEVR at 128 pixels, resized, is at 64
    with torch.no_grad():
        torch.testing.assert_close(classifier(larger), classifier(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(classifier.probabilities(larger), classifier.probabilities(images))
        small = SceneClassifier(replace(SMALL, image_size=32)).eval()
        small.load_state_dict(classifier.state_dict())
        torch.testing.assert_close(small(larger), small(images), rtol=0, atol=1e-5)
        assert not torch.allclose(small(images), classifier(images), atol=0.1)


def test_every_parameter_gets_a_gradient(images: Tensor) -> None:
    model = SceneClassifier(SMALL)
    model(images).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_batch_equals_its_pictures_one_by_one(classifier: SceneClassifier, images: Tensor) -> None:
    with torch.no_grad():
        alone = torch.cat([classifier(image[None]) for image in images])
        torch.testing.assert_close(classifier(images), alone, rtol=0, atol=1e-4)
        assert (alone.std(0) > 1e-3).all(), "the pictures differ for this classifier"


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)])
def test_pictures_of_another_shape_are_refused(classifier: SceneClassifier, shape: tuple[int, ...]) -> None:
    for method in (classifier, classifier.probabilities):
        with pytest.raises(ValueError, match=rf"images must be \(N, 3, H, W\), got \({', '.join(map(str, shape))}\)"):
            method(torch.zeros(shape))


def test_a_size_of_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        SceneClassifierConfig(image_size=0)


def test_stages_need_a_width_and_a_count_each() -> None:
    with pytest.raises(ValueError, match=r"one entry a stage each, got \(8, 16\) and \(1,\)"):
        SceneClassifier(SceneClassifierConfig(widths=(8, 16), blocks=(1,)))


# Probabilities


def test_probabilities_are_the_sigmoid_of_the_logits(classifier: SceneClassifier, images: Tensor) -> None:
    with torch.no_grad():
        wanted = 1 / (1 + (-classifier(images)).exp())
    torch.testing.assert_close(classifier.probabilities(images), wanted, rtol=0, atol=1e-6)


def test_a_batch_of_no_pictures_is_refused(classifier: SceneClassifier, images: Tensor) -> None:
    with pytest.raises(ValueError, match="batch_size must be between 1 and"):
        classifier.probabilities(images, batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_probabilities_do_not_depend_on_the_batches(
    classifier: SceneClassifier, images: Tensor, batch_size: int
) -> None:
    sizes: list[int] = []
    hook = classifier.conv1.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    found = classifier.probabilities(images, batch_size=batch_size)
    hook.remove()
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[batch_size]
    torch.testing.assert_close(found, classifier.probabilities(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_probabilities_are_of_eval_mode_and_leave_the_mode_alone(images: Tensor, training: bool) -> None:
    model = SceneClassifier(SMALL)
    perturbed(model)
    wanted = model.probabilities(images)
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(model.probabilities(images), wanted)
    with pytest.raises(ValueError, match="images"):
        model.probabilities(torch.zeros(2, 1, 8, 8))
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_probabilities_are_float32_without_a_gradient(classifier: SceneClassifier, images: Tensor) -> None:
    for dtype in (torch.float64, torch.float16):
        found = classifier.probabilities(images[:1].to(dtype))
        assert found.dtype == torch.float32
        assert not found.requires_grad
    with pytest.raises(ValueError, match=r"floating point in \[-1, 1\], got torch.uint8"):
        classifier.probabilities(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must be finite and in \[-1, 1\], got 0 to 255; scale it first"):
        classifier.probabilities(torch.tensor([0.0, 255.0]).expand(1, 3, 8, 2))


def test_no_pictures_have_no_probabilities(classifier: SceneClassifier) -> None:
    assert classifier.probabilities(torch.zeros(0, 3, 64, 64)).shape == (0, 24)


# Checkpoints


def test_what_was_saved_loads_bit_for_bit(classifier: SceneClassifier, images: Tensor, tmp_path: Path) -> None:
    loaded = SceneClassifier.from_pretrained(classifier.save_pretrained(tmp_path))
    assert loaded.config == SMALL
    assert not loaded.training
    assert torch.equal(loaded.probabilities(images), classifier.probabilities(images))


@pytest.fixture
def course_state(resnet: nn.Module) -> dict[str, Tensor]:
    """What the course's evaluator saves: a resnet18 whose ``fc`` is ``Sequential(Linear(512, 24), Sigmoid())``."""
    evaluator = torchvision.models.resnet18(weights=None)
    evaluator.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
    evaluator.load_state_dict(
        {name.replace("fc.", "fc.0."): tensor for name, tensor in resnet.state_dict().items()}, strict=True
    )
    return evaluator.state_dict()


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_courses_checkpoint_gives_the_same_answers(
    course_state: dict[str, Tensor], resnet: nn.Module, images: Tensor, tmp_path: Path, wrapped: bool, zipped: bool
) -> None:
    path = tmp_path / "checkpoint.pth"
    content = {"model": course_state, "epoch": 3} if wrapped else course_state
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    before = torch.random.get_rng_state()
    model = SceneClassifier.from_course_checkpoint(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert model.config.objects == ICLEVR_OBJECTS
    with torch.no_grad():
        assert torch.equal(model.probabilities(images), resnet(images).sigmoid())


class Evil:
    """Writes a file when it is unpickled in the usual, unsafe way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["plain", "torch", "legacy torch", "beside the tensors"])
def test_a_pickle_that_would_run_code_is_refused(course_state: dict[str, Tensor], tmp_path: Path, how: str) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "it-ran"
    evil = Evil(target)
    if how == "plain":
        path.write_bytes(pickle.dumps(evil))
    elif how == "beside the tensors":
        torch.save({"model": course_state, "args": evil}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=r"evil\.pth' is not the course's evaluator: .* It was not run") as error:
        SceneClassifier.from_course_checkpoint(path)
    assert "weights_only" not in str(error.value), "no advice to open it all the same"
    assert not target.exists()
    torch.load(path, weights_only=False) if how != "plain" else pickle.loads(path.read_bytes())
    assert target.exists(), "this test is able to fail"


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}},
        {"model": 3},
        {"other": torch.zeros(2)},
        {7: torch.zeros(2)},
        {},
        torch.zeros(2),
        [1, 2],
    ],
    ids=["other model", "no dict", "other key", "number as name", "empty", "tensor", "list"],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth' is not the course's evaluator, a resnet18") as error:
        SceneClassifier.from_course_checkpoint(tmp_path / "other.pth")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_the_courses_checkpoint_of_another_vocabulary_is_refused(
    course_state: dict[str, Tensor], tmp_path: Path
) -> None:
    for name in ("fc.0.weight", "fc.0.bias"):
        course_state[name] = course_state[name][:23]
    torch.save({"model": course_state}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"a resnet18 with 24 outputs: .*size mismatch for fc\.weight"):
        SceneClassifier.from_course_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02garbage", b"PK\x03\x04 no archive"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth' is not the course's evaluator: it is damaged"):
        SceneClassifier.from_course_checkpoint(tmp_path / "bad.pth")


def test_a_path_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*missing\.pth': No such file"):
        SceneClassifier.from_course_checkpoint(str(tmp_path / "missing.pth"))
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        SceneClassifier.from_course_checkpoint(tmp_path)
