"""Building a model: random states of others stay as they are, and what is too large is refused before it is made."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from condgan import DiffDiscriminator, DiscriminatorConfig, GeneratorConfig, IterativeGenerator
from condgan.building import SPARE, Building


def test_fresh_weights_are_random_and_take_no_number_from_others() -> None:
    before = torch.get_rng_state()
    with Building():
        first = nn.Linear(20, 20).weight
        second = nn.init.orthogonal_(torch.empty(20, 20))
        third, fourth, fifth = torch.randn(20, 20), torch.rand(20, 20), torch.randperm(400)
        IterativeGenerator(GeneratorConfig(width=4, image_size=32))
        DiffDiscriminator(DiscriminatorConfig(width=4, image_size=32))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.std().item() == pytest.approx(20**-0.5 / 3**0.5, rel=0.2)
    assert third.std().item() == pytest.approx(1, rel=0.2)
    assert fourth.mean().item() == pytest.approx(0.5, rel=0.2)
    assert fifth.unique().numel() == 400
    torch.testing.assert_close(second @ second.T, torch.eye(20), atol=1e-5, rtol=0)
    with Building():
        assert torch.equal(nn.Linear(20, 20).weight, first)


def test_a_source_that_is_named_is_drawn_from() -> None:
    with Building():
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, torch.randn(3, generator=torch.Generator().manual_seed(5)))


def test_what_another_thread_draws_meanwhile_does_not_come_again() -> None:
    numbers: list[torch.Tensor] = []
    with Building():
        nn.Linear(3, 3)
        thread = threading.Thread(target=lambda: numbers.append(torch.rand(4)))
        thread.start()
        thread.join()
    assert not torch.equal(torch.rand(4), numbers[0])


def test_what_could_never_be_loaded_is_refused_before_there_is_memory_for_it() -> None:
    make = (
        lambda: torch.zeros(10**12),
        lambda: torch.empty(10**6, 10**6),
        lambda: torch.randn(10**6, 10**6),
        lambda: torch.zeros(3).new_full((10**6, 10**6), 1.0),
        lambda: [torch.ones(60) for _ in range(20)],
    )
    for tensor in make:
        with pytest.raises(ValueError, match="many times as large as what is stored"), Building(100):
            tensor()
    with Building(100):
        torch.zeros(100 * SPARE)


def test_a_model_may_be_built_on_another_device() -> None:
    with torch.device("meta"), Building(1000):
        assert nn.Linear(5, 5).weight.is_meta
        assert torch.randn(3).is_meta
