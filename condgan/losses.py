"""Adversarial losses, gradient penalties and the named objectives made of them.

Tensors in, one number a sample out: no logging, no devices, no optimizers. Every loss is to be minimised. A
discriminator output is a logit without bound, positive meaning real; ``real_logits`` comes before ``fake_logits``.

How an objective is used, with ``d`` any discriminator that returns logits and object logits::

    objective = OBJECTIVES["relativistic"]
    loss = objective.discriminator(
        real_logits=..., fake_logits=..., real_object_logits=..., objects=objects)
    loss = loss + objective.penalty(real_logits=..., real=real, fake_logits=..., fake=fake)
    loss.mean().backward()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def _check_same_shape(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Refuse what would broadcast: (N,) against (N, 1) is (N, N), and a wrong loss."""
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )


def _check_logits(objects: Tensor, **logits: Tensor | None) -> None:
    """One logit for each row of objects."""
    if objects.ndim != 2:
        raise ValueError(f"objects must be (N, K), got {tuple(objects.shape)}")
    for name, given in logits.items():
        if given is not None and given.shape != objects.shape[:1]:
            raise ValueError(f"{name} must be ({len(objects)},), one for each row of objects, got {tuple(given.shape)}")


def wasserstein_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The critic's loss, ``-real + fake``.

    Shape:
        real_logits, fake_logits: (N,), any range.
        output: (N,).

    Raises:
        ValueError: the two shapes differ.

    Source: Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1 (which ascends; we descend). Unlike the paper, the
    weights are not clipped: the reference system bounds the critic with :func:`r1_penalty`.
    """
    _check_same_shape("real_logits", real_logits, "fake_logits", fake_logits)
    return fake_logits - real_logits


def wasserstein_generator_loss(*, real_logits: Tensor | None = None, fake_logits: Tensor) -> Tensor:
    """The generator's side of the critic's loss, ``-fake``.

    Args:
        real_logits: not used; taken so that all generator losses are called alike.
        fake_logits: (N,), any range.

    Shape:
        output: (N,).

    Source: Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1.
    """
    return -fake_logits


def hinge_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, ``relu(1 - real) + relu(1 + fake)``: logits beyond the margin of 1 no longer count.

    Shape:
        real_logits, fake_logits: (N,), any range.
        output: (N,), not negative.

    Raises:
        ValueError: the two shapes differ.

    Source: Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957.
    """
    _check_same_shape("real_logits", real_logits, "fake_logits", fake_logits)
    return F.relu(1 - real_logits) + F.relu(1 + fake_logits)


def hinge_generator_loss(*, real_logits: Tensor | None = None, fake_logits: Tensor) -> Tensor:
    """The generator's side of the hinge loss, ``-fake``: without a margin, so that it never runs dry.

    Args:
        real_logits: not used; taken so that all generator losses are called alike.
        fake_logits: (N,), any range.

    Shape:
        output: (N,).

    Source: Miyato et al. 2018, arXiv:1802.05957.
    """
    return -fake_logits


def relativistic_discriminator_loss(*, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic pair loss, ``softplus(-(real - fake))``: the real one of a pair should score higher.

    Shape:
        real_logits, fake_logits: (N,), any range; entry i of both shares its condition and previous picture.
        output: (N,), positive; log 2 where a pair scores the same.

    Raises:
        ValueError: the two shapes differ.

    Source: Huang et al. 2024 (R3GAN), arXiv:2501.05441, section 2, after Jolicoeur-Martineau 2018, arXiv:1807.00734.
    """
    _check_same_shape("real_logits", real_logits, "fake_logits", fake_logits)
    return F.softplus(fake_logits - real_logits)


def relativistic_generator_loss(*, real_logits: Tensor | None = None, fake_logits: Tensor) -> Tensor:
    """The generator's side of the relativistic pair loss, ``softplus(-(fake - real))``.

    Shape:
        real_logits, fake_logits: (N,), any range; entry i of both shares its condition and previous picture.
        output: (N,), positive; log 2 where a pair scores the same.

    Raises:
        ValueError: ``real_logits`` is missing, or the two shapes differ.

    Source: Huang et al. 2024 (R3GAN), arXiv:2501.05441, section 2.
    """
    if real_logits is None:
        raise ValueError("relativistic_generator_loss compares pairs: pass real_logits as well as fake_logits")
    _check_same_shape("real_logits", real_logits, "fake_logits", fake_logits)
    return F.softplus(real_logits - fake_logits)


def auxiliary_loss(object_logits: Tensor, objects: Tensor) -> Tensor:
    """Binary cross-entropy of the objects that a picture added, averaged over the K classes.

    The average over classes (not the sum) is what ``nn.BCELoss()`` does, the loss of the reference's public code.

    Shape:
        object_logits: (N, K), any range, positive means added.
        objects: (N, K) multi-hot, 0 or 1, same floating dtype.
        output: (N,), not negative.

    Raises:
        ValueError: the two shapes differ, or are not (N, K).

    Source: the auxiliary classifier of Odena et al. 2017, arXiv:1610.09585, with independent classes as in
    El-Nouby et al. 2019 (GeNeVA), arXiv:1811.09845.
    """
    _check_same_shape("object_logits", object_logits, "objects", objects)
    if objects.ndim != 2:
        raise ValueError(f"object_logits and objects must be (N, K), got {tuple(objects.shape)}")
    return F.binary_cross_entropy_with_logits(object_logits, objects, reduction="none").mean(1)


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of the gradient of every logit with respect to its own picture, graph kept.

    Summed over channels and pixels, so its size grows with the resolution. The norm is taken about zero, not about
    one as in WGAN-GP. A logit is taken to depend on its own picture only: batch norm in training mode mixes samples
    and would blur the result.

    Args:
        logits: (N,), computed from ``images``.
        images: (N, C, H, W), floating point, with ``requires_grad=True`` since before the forward pass.

    Returns:
        (N,), not negative, at least float32, differentiable once more with respect to the network's parameters.

    Raises:
        ValueError: ``logits`` is not (N,), or ``images`` does not require a gradient.

    Source: Mescheder et al. 2018, arXiv:1801.04406, section 4.1 (R1 and R2), without its factor 1/2.
    """
    if logits.shape != images.shape[:1]:
        raise ValueError(
            f"logits must be (N,) with one entry a picture, got {tuple(logits.shape)} for images {tuple(images.shape)}"
        )
    if not images.requires_grad:
        raise ValueError(
            "images must require a gradient: call images.requires_grad_() before the discriminator sees them"
        )
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return precise.flatten(1).square().sum(1)


def r1_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """:func:`gradient_penalty` on real pictures: (N,) from ``real_logits`` (N,) and ``real`` (N, C, H, W)."""
    return gradient_penalty(real_logits, real)


def r2_penalty(fake_logits: Tensor, fake: Tensor) -> Tensor:
    """:func:`gradient_penalty` on generated pictures: (N,) from ``fake_logits`` (N,) and ``fake`` (N, C, H, W)."""
    return gradient_penalty(fake_logits, fake)


def reverse_gradient(x: Tensor) -> Tensor:
    """``x``, through which gradients pass with their sign turned: what comes before it maximises the loss.

    With it one backward pass gives the gradients of both networks where :attr:`Objective.zero_sum`: the discriminator
    sees ``reverse_gradient(fake)`` and its loss is minimised by its own weights and maximised by the generator's.

    Shape:
        x: any, floating point.
        output: likewise.

    Source: Ganin and Lempitsky 2015, arXiv:1409.7495, section 3; for generative adversarial networks Shen et al. 2021,
    arXiv:2103.00430.
    """
    return 2 * x.detach() - x  # exactly x


@dataclass(frozen=True)
class Objective:
    """What discriminator and generator minimise: an adversarial loss, the auxiliary loss and the penalties.

    The weights multiply :func:`auxiliary_loss`, :func:`r1_penalty` and :func:`r2_penalty` as they are, without a
    further factor of 1/2. ``dataclasses.replace(OBJECTIVES["relativistic"], r1_weight=0.03)`` makes a variant.
    """

    name: str
    """The key in :data:`OBJECTIVES`."""
    discriminator_loss: Callable[..., Tensor]
    """Called with ``real_logits`` and ``fake_logits``."""
    generator_loss: Callable[..., Tensor]
    """Called with ``real_logits`` and ``fake_logits``."""
    aux_weight_discriminator: float
    """Weight of the auxiliary loss in the discriminator's loss."""
    aux_weight_generator: float
    """Weight of the auxiliary loss in the generator's loss."""
    r1_weight: float
    """Weight of the gradient penalty on real pictures."""
    r2_weight: float
    """Weight of the gradient penalty on generated pictures."""

    @property
    def zero_sum(self) -> bool:
        """Whether, for the generated pictures, the generator's loss is minus the discriminator's.

        Then one backward pass through the discriminator serves both (:func:`reverse_gradient`). Nothing but the
        Wasserstein losses may count generated pictures.
        """
        wasserstein = (wasserstein_discriminator_loss, wasserstein_generator_loss)
        others = self.aux_weight_generator or self.r2_weight
        return (self.discriminator_loss, self.generator_loss) == wasserstein and not others

    def discriminator(
        self,
        *,
        real_logits: Tensor,
        fake_logits: Tensor,
        real_object_logits: Tensor,
        objects: Tensor,
    ) -> Tensor:
        """The discriminator's loss without its penalties, which :meth:`penalty` gives and which may come less often.

        Shape:
            real_logits, fake_logits: (N,), the fake ones of detached pictures.
            real_object_logits: (N, K).
            objects: (N, K) multi-hot, what this turn added.
            output: (N,).

        Raises:
            ValueError: shapes differ.
        """
        _check_logits(objects, real_logits=real_logits, fake_logits=fake_logits)
        loss = self.discriminator_loss(real_logits=real_logits, fake_logits=fake_logits)
        if self.aux_weight_discriminator:
            loss = loss + self.aux_weight_discriminator * auxiliary_loss(real_object_logits, objects)
        return loss

    def penalty(
        self,
        *,
        real_logits: Tensor | None = None,
        real: Tensor | None = None,
        fake_logits: Tensor | None = None,
        fake: Tensor | None = None,
    ) -> Tensor:
        """The weighted gradient penalties, to be added to :meth:`discriminator`.

        A penalty whose weight is zero is not computed, and its tensors may be None. Whoever adds the sum only every
        k-th step (lazy regularisation, Karras et al. 2020, arXiv:1912.04958, section 3.1) multiplies it by k.

        Shape:
            real_logits, fake_logits: (N,), computed from ``real`` and ``fake``, which require a gradient.
            real, fake: (N, C, H, W).
            output: (N,), not negative; a single zero, shape (), when both weights are zero.

        Raises:
            ValueError: tensors of a penalty with a weight are missing, or do not fit :func:`gradient_penalty`.
        """
        given = real_logits if real_logits is not None else fake_logits
        total = torch.zeros((), device=None if given is None else given.device)
        for name, weight, logits, images in (
            ("real", self.r1_weight, real_logits, real),
            ("fake", self.r2_weight, fake_logits, fake),
        ):
            if not weight:
                continue
            if logits is None or images is None:
                raise ValueError(f"objective {self.name!r} penalises {name} pictures: pass {name}_logits and {name}")
            total = total + weight * gradient_penalty(logits, images)
        return total

    def generator(
        self,
        *,
        real_logits: Tensor | None = None,
        fake_logits: Tensor,
        fake_object_logits: Tensor | None = None,
        objects: Tensor,
    ) -> Tensor:
        """The generator's loss.

        Shape:
            real_logits: (N,), of the pictures paired with the fakes; read by relativistic losses.
            fake_logits: (N,).
            fake_object_logits: (N, K); read where ``aux_weight_generator`` is not zero.
            objects: (N, K) multi-hot, what this turn was to add.
            output: (N,).

        Raises:
            ValueError: shapes differ, or tensors that this objective reads are None.
        """
        _check_logits(objects, real_logits=real_logits, fake_logits=fake_logits)
        loss = self.generator_loss(real_logits=real_logits, fake_logits=fake_logits)
        if self.aux_weight_generator:
            if fake_object_logits is None:
                raise ValueError(f"objective {self.name!r} has an auxiliary loss: pass fake_object_logits as well")
            loss = loss + self.aux_weight_generator * auxiliary_loss(fake_object_logits, objects)
        return loss


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            name="reference",
            discriminator_loss=wasserstein_discriminator_loss,
            generator_loss=wasserstein_generator_loss,
            aux_weight_discriminator=1.0,
            aux_weight_generator=0.0,
            r1_weight=1.0,
            r2_weight=0.0,
        ),
        Objective(
            name="reference-code",
            discriminator_loss=hinge_discriminator_loss,
            generator_loss=hinge_generator_loss,
            aux_weight_discriminator=5.0,
            aux_weight_generator=5.0,
            r1_weight=1.0,
            r2_weight=0.0,
        ),
        Objective(
            name="relativistic",
            discriminator_loss=relativistic_discriminator_loss,
            generator_loss=relativistic_generator_loss,
            aux_weight_discriminator=1.0,
            aux_weight_generator=1.0,
            r1_weight=0.001,
            r2_weight=0.001,
        ),
    )
}
"""The named objectives.

- ``reference``: the formulas of the reference system's report, ``D = -real + fake + aux + R1`` and ``G = -fake``. The
  report does not say which pictures its auxiliary loss counts; we take the real ones.
- ``reference-code``: what its public code does instead, a hinge loss with 5 x aux on both sides.
- ``relativistic``: the loss of R3GAN (arXiv:2501.05441) with both penalties, and the auxiliary loss on both sides.
"""
