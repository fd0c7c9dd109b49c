"""Every layer: shapes, dtypes, gradients, bad input, equality with a plain version, and what makes it what it is."""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from condgan import layers
from condgan.derived import Derived, steady_weights
from condgan.layers import (
    ConditionalBatchNorm2d,
    ConditionProjector,
    DisBlock,
    GenBlock,
    enlarging_weight,
    halving_weight,
)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "cbn": (lambda: ConditionalBatchNorm2d(3, 5), ((2, 3, 4, 5), (2, 5))),
    "gen": (lambda: GenBlock(3, 4, 5), ((2, 3, 4, 5), (2, 5))),
    "dis": (lambda: DisBlock(3, 4), ((2, 3, 5, 7),)),
    "dis first": (lambda: DisBlock(3, 4, preactivate=False), ((2, 3, 5, 7),)),
    "dis plain": (lambda: DisBlock(3, 4, spectral=False), ((2, 3, 5, 7),)),
    "projector": (lambda: ConditionProjector(5, 6), ((2, 6), (2, 5))),
    "projector plain": (lambda: ConditionProjector(5, 6, spectral=False), ((2, 6), (2, 5))),
}
PLAIN: dict[str, Callable[..., Tensor]] = {
    "cbn": reference.conditional_batch_norm,
    "gen": reference.gen_block,
    "dis": lambda block, x: reference.dis_block(block, x, first=False),
    "dis first": lambda block, x: reference.dis_block(block, x, first=True),
    "projector": reference.condition_projection,
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    """A layer with weights and running statistics of its own, in eval mode, and input for it."""
    layer, shapes = LAYERS[name]
    rng = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):  # the same layer, whatever ran before
        torch.manual_seed(1)
        made = randomise(layer()).to(dtype)
    return made, [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_the_plain_version(name: str, training: bool) -> None:
    layer, inputs = make(name, torch.float64)
    layer.train(training)
    output = layer(*inputs)
    expected = PLAIN[name.removesuffix(" plain")](layer, *inputs)  # after it: the vectors it left behind
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=1e-10)


@every_layer
def test_small_and_large_maps_pass_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way a block takes, its output and gradients are the same."""
    layer, inputs = make(name, torch.float64)
    found = []
    for least in (0, 10**9):
        monkeypatch.setattr(layers, "ENLARGED_PIXELS", least)
        monkeypatch.setattr(layers, "HALVED_PIXELS", least)
        output = layer(*inputs)
        found.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_drawing_with_many_weights_and_few_pixels_leaves_the_weights_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = GenBlock(6, 4, 5).double()  # 216 weights
    x, condition = torch.randn(1, 6, 4, 4).double(), torch.randn(1, 5).double()
    found: list[torch.Tensor] = []
    added_up: list[torch.Tensor] = []

    def add_up(weight: torch.Tensor) -> torch.Tensor:
        added_up.append(weight)
        return layers.enlarging_weight(weight)

    monkeypatch.setattr(block, "_enlarging_weight", add_up)
    for weights_per_pixel in (14, 13):  # 16 pixels: 224 and 208
        monkeypatch.setattr(layers, "WEIGHTS_PER_PIXEL", weights_per_pixel)
        found.append(block(x, condition))
        assert len(added_up) == 1, "the second time they are not"
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(1, 2), (2, 2), (3, 5), (8, 7)])
def test_shapes_of_batches_of_one_and_odd_sizes(n: int, height: int, width: int) -> None:
    x, condition = torch.randn(n, 3, height, width), torch.randn(n, 5)
    assert ConditionalBatchNorm2d(3, 5)(x, condition).shape == x.shape
    assert GenBlock(3, 2, 5)(x, condition).shape == (n, 2, 2 * height, 2 * width)
    if height > 1:
        assert DisBlock(3, 2)(x).shape == (n, 2, height // 2, width // 2)
    assert ConditionProjector(5, 4)(torch.randn(n, 4), condition).shape == (n,)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    layer, inputs = make(name, dtype)
    output = layer(*inputs)
    assert output.dtype == dtype
    assert output.isfinite().all()


@every_layer
def test_every_parameter_and_input_gets_a_finite_gradient(name: str) -> None:
    layer, inputs = make(name)
    layer.train()
    inputs = [x.requires_grad_() for x in inputs]
    layer(*inputs).square().sum().backward()
    for key, tensor in [*layer.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]:
        assert tensor.grad is not None, key
        assert tensor.grad.isfinite().all(), key
        assert key.endswith("bias") or tensor.grad.abs().sum() > 0, key


@every_layer
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    layer, inputs = make(name, torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)  # gradient penalties need them


@every_layer
def test_in_eval_a_batch_equals_its_items_one_by_one(name: str) -> None:
    layer, inputs = make(name)
    one_by_one = [layer(*(x[i : i + 1] for x in inputs)) for i in range(len(inputs[0]))]
    torch.testing.assert_close(layer(*inputs), torch.cat(one_by_one), atol=1e-5, rtol=1e-5)


# Conditional batch norm


@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_conditional_batch_norm_is_plain_batch_norm(training: bool) -> None:
    fresh, plain = ConditionalBatchNorm2d(3, 5).train(training), nn.BatchNorm2d(3, affine=False).train(training)
    for _ in range(2):
        x = 3 * torch.randn(4, 3, 5, 5) + 1
        torch.testing.assert_close(fresh(x, torch.randn(4, 5)), plain(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(fresh.bn.running_mean, plain.running_mean)
    assert torch.equal(fresh.bn.running_var, plain.running_var)


def test_scale_and_shift_are_predicted_for_every_item_and_channel() -> None:
    layer = ConditionalBatchNorm2d(2, 3).eval()
    with torch.no_grad():
        layer.fc.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 5.0]))  # scales of the two channels, then their shifts
        layer.fc.weight[0, 2] = 1.0  # channel 0's scale follows the condition's last entry
    out = layer(torch.ones(2, 2, 1, 1), torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 10.0]]))
    expected = torch.tensor([[2.0, 6.0], [12.0, 6.0]])
    torch.testing.assert_close(out[:, :, 0, 0], expected, atol=1e-4, rtol=1e-4)  # eps of the norm


def test_eval_reads_the_running_statistics_and_training_updates_them() -> None:
    layer = ConditionalBatchNorm2d(3, 5).eval()
    x, condition = torch.randn(4, 3, 5, 5) + 2, torch.randn(4, 5)
    layer(x, condition)
    assert layer.bn.running_mean.abs().sum() == 0
    layer.train()(x, condition)
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * x.mean((0, 2, 3)))


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (5,), (2, 5, 1)])
def test_conditional_batch_norm_shows_both_shapes_of_a_bad_condition(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="condition must be") as caught:
        ConditionalBatchNorm2d(3, 5)(torch.zeros(2, 3, 4, 4), torch.zeros(shape))
    assert "(N, 5)" in str(caught.value)
    assert "(2, 3, 4, 4)" in str(caught.value)
    assert str(shape) in str(caught.value)
    with pytest.raises(ValueError, match="condition must be"):
        GenBlock(3, 3, 5)(torch.zeros(2, 3, 4, 4), torch.zeros(shape))


def test_channels_that_do_not_match_are_an_error() -> None:
    for layer in (ConditionalBatchNorm2d(3, 5), ConditionalBatchNorm2d(3, 5).eval()):
        for shape in ((2, 4, 4, 4), (2, 1, 4, 4), (2, 3, 4)):  # of which the last two would broadcast
            with pytest.raises(ValueError, match=rf"x must be \(N, 3, H, W\), got \({str(shape)[1:-1]}\)"):
                layer(torch.zeros(shape), torch.zeros(2, 5))
    wrong = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\), got \(2, 4, 4, 4\)"):
        GenBlock(3, 3, 5)(wrong, torch.zeros(2, 5))
    for call in (DisBlock(3, 3), lambda x: DisBlock(3, 3).changes(x, [x])):
        with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\), H and W at least 2, got \(2, 4, 4, 4\)"):
            call(wrong)


# Blocks


def test_a_generator_block_whose_main_path_is_silent_is_an_upsampled_1x1_convolution() -> None:
    block = GenBlock(2, 2, 5).eval()
    with torch.no_grad():
        nn.init.zeros_(block.c2.weight)
        nn.init.zeros_(block.c2.bias)
        nn.init.zeros_(block.c0.bias)
        block.c0.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]])[:, :, None, None])  # swaps the channels
    x = torch.randn(1, 2, 2, 3)
    assert torch.equal(block(x, torch.randn(1, 5)), x.flip(1).repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 3)])
def test_upsampling_and_a_convolution_are_one_transposed_convolution(height: int, width: int) -> None:
    weight, x = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.conv2d(reference.upsample(x), weight, padding=1)
    torch.testing.assert_close(F.conv_transpose2d(x, enlarging_weight(weight), stride=2, padding=1), expected)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 6), (5, 3)])
def test_a_convolution_and_pooling_are_one_convolution(height: int, width: int) -> None:
    weight, x = torch.randn(4, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.avg_pool2d(F.conv2d(x, weight, padding=1), 2)
    torch.testing.assert_close(F.conv2d(x, halving_weight(weight), stride=2, padding=1), expected)


def test_a_block_draws_with_the_weights_that_it_has_however_they_were_changed() -> None:
    """What it remembers of a weight must not outlive it."""
    block, (x, condition) = make("gen")
    assert isinstance(block, GenBlock)
    changes: list[Callable[[Tensor], object]] = [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.add_(1),  # no version counter sees this
        lambda weight: weight.data.zero_(),
        lambda weight: weight.detach().numpy().fill(0.5),
    ]
    with torch.no_grad():
        for change in changes:
            block(x, condition)
            change(block.c1.weight)
            torch.testing.assert_close(block(x, condition), reference.gen_block(block, x, condition))
        block(x, condition)
        fine = block.double()(x.double(), condition.double())
        torch.testing.assert_close(fine, reference.gen_block(block, x.double(), condition.double()), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias", "bn.running_mean", "bn.running_var"])
def test_a_conditional_norm_normalises_with_what_it_has_however_it_was_changed(name: str) -> None:
    norm, (x, condition) = make("cbn")
    with torch.no_grad():
        before = norm(x, condition)
        tensor = dict([*norm.named_parameters(), *norm.named_buffers()])[name]
        tensor.data[0] += 1
        after = norm(x, condition)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, reference.conditional_batch_norm(norm, x, condition))


@pytest.mark.parametrize("fails", [False, True])
def test_in_a_block_of_steady_weights_they_are_looked_at_once(fails: bool) -> None:
    block, (x, condition) = make("gen")
    assert isinstance(block, GenBlock)
    with torch.no_grad():
        block(x, condition)
        block.c1.weight.data.mul_(2)
        before = reference.gen_block(block, x, condition)
        with contextlib.suppress(RuntimeError), steady_weights():
            torch.testing.assert_close(block(x, condition), before)
            block.c1.weight.data.mul_(2)
            torch.testing.assert_close(block(x, condition), before)
            with torch.enable_grad():
                assert block(x, condition).requires_grad, "who learns is not served what was held"
            if fails:
                raise RuntimeError
        torch.testing.assert_close(block(x, condition), reference.gen_block(block, x, condition))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own forward mode uses it
def test_what_a_block_remembers_does_not_meet_transforms_of_it() -> None:
    """Tensors of ``torch.func`` and of forward-mode derivatives hold no values to compare or to keep."""
    blocks = [make("gen")[0] for _ in range(3)]
    _, (x, condition) = make("gen")
    stacked, buffers = torch.func.stack_module_state([*blocks])
    x, condition = torch.randn(2, 3, 16, 24), condition[:2]  # large enough for weights to be added up

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(blocks[0], (weights, buffers), (x, condition))
        return output

    with torch.no_grad():
        expected = torch.stack([block(x, condition) for block in blocks])
        torch.testing.assert_close(torch.vmap(call)(stacked, buffers), expected)
        torch.testing.assert_close(blocks[0](x, condition), expected[0])

        block = blocks[0].double()
        x, condition = x.double(), condition.double()
        weight = block.get_parameter("c1.weight")
        inputs = ({"c1.weight": weight.detach()},), ({"c1.weight": torch.ones_like(weight)},)
        before, change = torch.func.jvp(lambda new: torch.func.functional_call(block, new, (x, condition)), *inputs)
        weight += 1e-7
        torch.testing.assert_close((block(x, condition) - before) / 1e-7, change, rtol=1e-3, atol=1e-3)


def test_what_a_block_remembers_does_not_meet_tensors_without_values() -> None:
    block, (x, condition) = make("gen")
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert block(x, condition).shape == (2, 4, 2 * x.shape[2], 2 * x.shape[3])
        torch.testing.assert_close(block(x, condition), reference.gen_block(block, x, condition))


def test_a_pickled_block_is_as_large_as_its_weights() -> None:
    block, inputs = make("gen")
    before = len(pickle.dumps(block))
    with torch.no_grad():
        expected = block(*inputs)
        assert len(pickle.dumps(block)) == before
        assert torch.equal(pickle.loads(pickle.dumps(block))(*inputs), expected)


@pytest.mark.parametrize("name", ["gen", "dis", "cbn"])
def test_a_layer_with_hooks_or_another_in_its_place_is_called(name: str) -> None:
    """Adapters, pruning and spectral normalisation by hooks change what a layer does, and not its weight alone."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Conv2d | nn.Linear) -> None:
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias
            self.in_features = getattr(base, "in_features", None)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    layer = {"gen": GenBlock(3, 4, 5), "dis": DisBlock(3, 4, spectral=False), "cbn": ConditionalBatchNorm2d(3, 5)}[name]
    layer = randomise(layer).eval()
    inputs = (torch.randn(4, 3, 64, 64), *([] if name == "dis" else [torch.randn(4, 5)]))
    inner = [(key, part) for key, part in layer.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    for key, part in inner:
        with torch.no_grad():
            plain = layer(*inputs)
            calls: list[nn.Module] = []
            hook = part.register_forward_hook(partial(lambda calls, part, *_: calls.append(part), calls))
            torch.testing.assert_close(layer(*inputs), plain, rtol=1e-4, atol=1e-4)
            hook.remove()
            assert calls == [part], key
            parent, _, last = key.rpartition(".")
            setattr(layer.get_submodule(parent), last, Adapted(part))
            assert not torch.allclose(layer(*inputs), plain, atol=1e-3), key
            setattr(layer.get_submodule(parent), last, part)
        normed = torch.nn.utils.spectral_norm(part)
        layer(*inputs).square().sum().backward()
        assert normed.get_parameter("weight_orig").grad is not None, key
        torch.nn.utils.remove_spectral_norm(normed)


CONVOLUTIONS = {
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "5x5": {"kernel_size": 5, "padding": 2},
    "1x1": {"kernel_size": 1},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
}


@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("name", ["gen", "dis"])
@torch.no_grad()
def test_another_convolution_in_a_block_does_what_it_says(name: str, shape: dict[str, Any]) -> None:
    block = GenBlock(4, 4, 5).eval() if name == "gen" else DisBlock(4, 4, spectral=False).eval()
    inputs = (torch.randn(4, 4, 64, 64), *([torch.randn(4, 5)] if name == "gen" else []))
    part = "c1" if name == "gen" else "c2"
    setattr(block, part, nn.Conv2d(4, 4, **shape))
    found = block(*inputs)
    seen: list[Tensor] = []
    block.get_submodule(part).register_forward_hook(lambda module, given, output: seen.append(output))
    torch.testing.assert_close(found, block(*inputs))
    assert len(seen) == 1, "with a hook it is called"


@pytest.mark.parametrize("name", ["gen", "dis", "cbn"])
def test_gradients_can_be_watched_and_a_forward_can_be_replaced(name: str) -> None:
    layer = {"gen": GenBlock(3, 4, 5), "dis": DisBlock(3, 4, spectral=False), "cbn": ConditionalBatchNorm2d(3, 5)}[name]
    layer = randomise(layer).eval()
    inputs = (torch.randn(4, 3, 64, 64), *([] if name == "dis" else [torch.randn(4, 5)]))
    for key, part in layer.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            calls: list[nn.Module] = []
            hook = part.register_full_backward_hook(partial(lambda calls, part, *_: calls.append(part), calls))
            layer(*(x.requires_grad_() for x in inputs)).square().sum().backward()
            hook.remove()
            assert calls == [part], key
            before, forward = layer(*inputs), part.forward
            part.forward = lambda x, forward=forward: 2 * forward(x)  # type: ignore[method-assign, misc]
            assert not torch.allclose(layer(*inputs), before, atol=1e-3), key
            del part.forward


NORMS: dict[str, Callable[[], nn.Module]] = {
    "affine": lambda: nn.BatchNorm2d(4),
    "another eps": lambda: nn.BatchNorm2d(4, affine=False, eps=1.0),
    "of the batch": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "groups": lambda: nn.GroupNorm(2, 4),
    "none": nn.Identity,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@torch.no_grad()
def test_another_norm_is_used_in_eval_mode_as_in_training(norm: Callable[[], nn.Module]) -> None:
    layer = randomise(ConditionalBatchNorm2d(4, 5)).eval()
    layer.bn = norm().eval()
    if getattr(layer.bn, "weight", None) is not None:
        nn.init.constant_(layer.bn.weight, 3.0)
    x, condition = torch.randn(3, 4, 6, 6), torch.randn(3, 5)
    scale, shift = layer.fc(condition)[:, :, None, None].chunk(2, 1)
    torch.testing.assert_close(layer(x, condition), layer.bn(x) * (1 + scale) + shift)


def test_changes_see_one_step_of_spectral_normalisation() -> None:
    block = DisBlock(3, 8).train()
    x, change = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    vectors = [buffer.clone() for buffer in block.buffers()]
    y, (found,) = block.changes(x, [change])
    assert any(not torch.equal(a, b) for a, b in zip(vectors, block.buffers(), strict=True))
    block.eval()  # with the vectors of that step
    torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, block(x + change) - block(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_remembered_is_of_the_weights_that_it_is_compared_with() -> None:
    """Another thread may change a weight while something is made of it, and change it back."""
    weight = torch.ones(3)

    def make(given: Tensor) -> Tensor:
        weight.fill_(2)
        made = given + 0
        weight.fill_(1)
        return made

    double = Derived(make)
    assert torch.equal(double(weight), torch.ones(3))
    assert torch.equal(double(weight), torch.ones(3))


def test_what_a_block_remembers_is_no_part_of_its_state() -> None:
    block, inputs = make("gen")
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with torch.inference_mode():
        block(*inputs)
    after = block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    block(*inputs).sum().backward()
    assert block.get_parameter("c1.weight").grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # PyTorch's own forward mode uses it
def test_a_rectified_change_is_the_difference_of_the_rectified_and_so_are_its_derivatives() -> None:
    x, change = 0.1 + torch.rand(2, 40, dtype=torch.float64)
    x, change = x * torch.tensor([1.0, -1.0]).repeat(20), 3 * change * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(10)
    inputs = (x.requires_grad_(), change.requires_grad_())
    assert ((x + change > 0) != (x > 0)).any()
    expected = F.leaky_relu(x + change, 0.01) - F.leaky_relu(x, 0.01)
    torch.testing.assert_close(layers.rectified_change(*inputs), expected)
    assert torch.autograd.gradcheck(layers.rectified_change, inputs)
    assert torch.autograd.gradgradcheck(layers.rectified_change, inputs)
    plain = lambda x, change: F.leaky_relu(x + change, 0.01) - F.leaky_relu(x, 0.01)  # noqa: E731
    tangents = tuple(torch.rand_like(given) for given in inputs)
    found, wanted = (torch.func.jvp(f, inputs, tangents) for f in (layers.rectified_change, plain))
    torch.testing.assert_close(found, wanted)
    found, wanted = (
        torch.vmap(torch.func.grad(lambda *given, f=f: f(*given).square().sum(), (0, 1)))(*inputs)
        for f in (layers.rectified_change, plain)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("preactivate", [True, False])
@pytest.mark.parametrize("size", [8, 48])  # in small maps the second convolution and the pooling are two steps
def test_changes_of_a_discriminator_block_are_differences(size: int, preactivate: bool, spectral: bool) -> None:
    block = randomise(DisBlock(3, 5, preactivate, spectral)).double().eval()
    x, *changes = torch.randn(3, 2, 3, size, size, dtype=torch.float64)
    y, found = block.changes(x, changes)
    torch.testing.assert_close(y, block(x))
    assert len(found) == 2
    for change, difference in zip(changes, found, strict=True):
        torch.testing.assert_close(difference, block(x + change) - block(x))


@torch.no_grad()
def test_in_bfloat16_changes_are_rounded_as_changes_are() -> None:
    block = randomise(DisBlock(3, 16, spectral=False))
    x = torch.randn(2, 3, 32, 32)
    change = torch.randn(2, 3, 32, 32) / 1000
    expected = block(x + change) - block(x)
    coarse, (x, change, nearby) = block.bfloat16(), (y.bfloat16() for y in (x, change, x + change))
    carried, subtracted = coarse.changes(x, [change])[1][0], coarse(nearby) - coarse(x)
    errors = [(y.float() - expected).norm() / expected.norm() for y in (carried, subtracted)]
    assert errors[0] < 0.1 < 0.5 < errors[1]


def test_a_discriminator_block_too_small_to_halve_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"H and W at least 2, got \(2, 3, 1, 4\)"):
        DisBlock(3, 4)(torch.randn(2, 3, 1, 4))


@pytest.mark.parametrize("preactivate", [True, False])
def test_the_shortcut_of_a_discriminator_block_sees_the_input_before_any_activation(preactivate: bool) -> None:
    block = DisBlock(3, 3, preactivate, spectral=False)
    with torch.no_grad():
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
        block.c0.weight.copy_(torch.eye(3)[:, :, None, None])
    torch.testing.assert_close(block(torch.full((1, 3, 4, 4), -2.0)), torch.full((1, 3, 2, 2), -2.0))
    with torch.no_grad():
        block.c0.weight.zero_()
        block.c1.weight[:, :, 1, 1] = -torch.eye(3)
        block.c2.weight[:, :, 1, 1] = torch.eye(3)
    value = 0.02 if preactivate else 2.0  # -2 is rectified to -0.02 or not; c1 turns the sign
    torch.testing.assert_close(block(torch.full((1, 3, 4, 4), -2.0)), torch.full((1, 3, 2, 2), value))


# Projection


def test_the_projection_is_linear_in_the_features() -> None:
    projector = randomise(ConditionProjector(5, 6))
    a, b, condition = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, 5)
    torch.testing.assert_close(
        projector(a - 2 * b, condition), projector(a, condition) - 2 * projector(b, condition), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("features", "condition"), [((2, 5), (2, 5)), ((2, 6), (3, 5)), ((2, 6), (2, 6)), ((6,), (5,))]
)
def test_the_projection_shows_the_shapes_of_bad_input(features: tuple[int, ...], condition: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features and condition must be") as caught:
        ConditionProjector(5, 6)(torch.zeros(features), torch.zeros(condition))
    assert f"{features} and {condition}" in str(caught.value)


# Spectral normalisation


def applied_weights(layer: nn.Module) -> dict[str, Tensor]:
    return {key: module.weight for key, module in layer.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize("name", ["dis", "projector"])
def test_spectral_norm_brings_the_largest_singular_value_to_one(name: str) -> None:
    layer, inputs = make(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 7
        layer.train()
        for _ in range(200):  # one power iteration a call
            layer(*inputs)
        layer.eval()
        for key, weight in applied_weights(layer).items():
            largest = torch.linalg.matrix_norm(weight.flatten(1), 2)
            torch.testing.assert_close(
                largest, torch.tensor(1.0), atol=1e-3, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", ["dis", "projector"])
def test_spectral_norm_moves_its_vectors_in_training_and_leaves_them_alone_in_eval(name: str) -> None:
    layer, inputs = make(name)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    assert len(before) == 2 * len(applied_weights(layer))
    layer(*inputs)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())
    layer.train()(*inputs)
    assert not any(torch.equal(value, before[key]) for key, value in layer.named_buffers() if value.numel() > 1)


@pytest.mark.parametrize("name", ["dis plain", "projector plain"])
def test_without_spectral_norm_the_weights_are_applied_as_they_are(name: str) -> None:
    layer, _ = make(name)
    assert not list(layer.buffers())
    assert {key.rsplit(".", 1)[1] for key, _ in layer.named_parameters()} == {"weight", "bias"}


def test_repr_says_what_the_arguments_were() -> None:
    assert "ConditionalBatchNorm2d(\n  64, condition_dim=128\n" in repr(ConditionalBatchNorm2d(64, 128))
    assert "preactivate=False" in repr(DisBlock(3, 4, preactivate=False))


def test_weights_that_one_thread_makes_are_not_handed_to_another() -> None:
    """PyTorch keeps one cache of them for all threads; those that another thread makes may have no gradient."""
    block = DisBlock(3, 4)
    inside, leave = threading.Event(), threading.Event()

    def look() -> None:
        with torch.no_grad(), layers.weights_made_once():
            assert not block.c1.weight.requires_grad
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=look)
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    _, (change,) = block.changes(torch.randn(2, 3, 4, 4), [torch.randn(2, 3, 4, 4)])
    thread.join()
    change.sum().backward()
    assert all(parameter.grad is not None for name, parameter in block.named_parameters() if "bias" not in name)
