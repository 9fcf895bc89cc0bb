"""What a requirement's check drives: a sharpness-aware optimizer around a model, ours or a peer's, in one language."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod

import torch
from pytorch_optimizer import SAM, LookSAM
from pytorch_optimizer.optimizer.utils.model import disable_running_stats, enable_running_stats

import shapo_kernels as sk

RHO, LR = 0.3, 0.1


class Wrapper(ABC):
    """An update in its four parts; a loss is a callable, so that each pass may compute it anew.

    Args:
        model: whose parameters are trained.
        base: class of the base optimizer, and its options.
        rho: radius.
        only: names -> selected columns; everything by default. A peer that knows no subspace moves everything.
        groups: parameter groups; one by default.
        settings: what belongs to the wrapper and not to the base (ours: `interval=`, …).
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self, model, *, base=torch.optim.SGD, rho=RHO, lr=LR, only=None, groups=None, settings=None, **options
    ):
        self.model = model
        self.optimizer = self.made(base, rho, only, groups or model.parameters(), settings or {}, lr=lr, **options)

    @abstractmethod
    def made(self, base, rho, only, parameters, settings, **options):
        """The optimizer, around `base` made of the parameters."""

    def find(self, *losses):
        """Pass 1, over all micro-batches."""
        for loss in losses:
            (loss() / len(losses)).backward()

    def move(self):
        self.optimizer.first_step(zero_grad=True)

    def descend(self, *losses):
        """Pass 2."""
        for loss in losses:
            (loss() / len(losses)).backward()

    def finish(self):
        """Back, and the base's step."""
        self.optimizer.second_step(zero_grad=True)

    def update(self, *losses):
        self.find(*losses)
        self.move()
        self.descend(*losses)
        self.finish()

    def update_by_closure(self, closure):
        return self.optimizer.step(closure)

    def update_scaled(self, scaler, ascent, descent):
        """An update under a GradScaler, whose two losses may differ: how a careful user of a SAM writes it."""
        scaler.scale(ascent()).backward()
        self.move()
        scaler.scale(descent()).backward()
        scaler.unscale_(self.optimizer)
        self.finish()
        scaler.update()

    def each_its_own(self, *losses):
        """A perturbation for each micro-batch, and one step."""
        for loss in losses:
            self.find(lambda loss=loss: loss() / len(losses))
            self.move()
            self.descend(lambda loss=loss: loss() / len(losses))
            self.finish()

    def stats(self):
        raise AssertionError(f"{type(self).__name__} reports nothing")

    def normalisation_frozen(self):
        raise AssertionError(f"{type(self).__name__} has no helper")


class Ours(Wrapper):
    """`ShaPOOptimizer` by contexts; everything in place, unless the check says otherwise."""

    def made(self, base, rho, only, parameters, settings, **options):
        subspace = sk.Subspace.full(self.model) if only is None else sk.Subspace(only)
        return sk.ShaPOOptimizer(base(parameters, **options), self.model, subspace, rho=rho, **settings)

    def find(self, *losses):
        with self.optimizer.ascent():
            for loss in losses:
                self.optimizer.ascend(loss() / len(losses))

    def move(self):
        self.optimizer.perturb()

    def finish(self):
        self.optimizer.restore()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_scaled(self, scaler, ascent, descent):
        with self.optimizer.ascent():
            self.optimizer.ascend(ascent(), scaler=scaler)
        with self.optimizer.perturbed():
            scaler.scale(descent()).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()

    def each_its_own(self, *losses):
        for loss in losses:
            with self.optimizer.ascent():
                self.optimizer.ascend(loss())
            with self.optimizer.perturbed():
                (loss() / len(losses)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stats(self):
        return self.optimizer.stats

    def normalisation_frozen(self):
        return sk.frozen_batch_norm(self.model)


class OursByDelta(Ours):
    """The same with `perturbation="delta"`, for checks of linear layers."""

    def made(self, base, rho, only, parameters, settings, **options):
        return super().made(base, rho, only, parameters, {"perturbation": "delta", **settings}, **options)


class PytorchOptimizer(Wrapper):
    """`pytorch_optimizer.SAM`, released; its documentation calls the closure once before `step`."""

    def update_by_closure(self, closure):
        closure()
        return self.optimizer.step(closure)

    def made(self, base, rho, only, parameters, settings, **options):
        return SAM(parameters, base, rho=rho, **options)

    @contextlib.contextmanager
    def normalisation_frozen(self):
        disable_running_stats(self.model)
        yield
        enable_running_stats(self.model)


class PytorchLookSAM(PytorchOptimizer):
    """`pytorch_optimizer.LookSAM`, its interval."""

    def made(self, base, rho, only, parameters, settings, **options):
        return LookSAM(parameters, base, rho=rho, k=settings["interval"], **options)
