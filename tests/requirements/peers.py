"""Stand-ins for peers that are not installed: SAM as its paper has it, each with one habit that is known of a peer.

Whose habit it is: research on davda54/sam, MosaicML composer, Sparse-SAM, ESAM and the published ShaPO code, by their
public code and issues. The lines are this repository's own.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from tests.requirements.wrappers import Wrapper


class Textbook(Optimizer):
    """Algorithm 1 of arXiv:2010.01412, restored from copies."""

    def __init__(self, parameters, base, rho, only=None, model=None, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base, self.only, self.model = base(self.param_groups, **options), only, model
        self.kept = {}

    def held(self):
        return [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]

    def norm(self):
        return torch.stack([p.grad.double().norm() for p, _ in self.held()]).norm()

    def eps(self, p, rho, norm):
        return (p.grad * (rho / (norm + 1e-12))).to(p.dtype)

    def put_back(self, p):
        p.copy_(self.kept.pop(p)[0])

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = self.norm()
        for p, rho in self.held():
            eps = self.eps(p, rho, norm)
            self.kept[p] = p.clone(), eps
            p.add_(eps)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in list(self.kept):
            self.put_back(p)
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Peer(Wrapper):
    habits = Textbook

    def made(self, base, rho, only, parameters, settings, **options):
        return self.habits(parameters, base, rho, only=only, model=self.model, **options)


class SubtractsEps(Peer):
    """composer, Sparse-SAM: theta = (theta + eps) - eps."""

    class habits(Textbook):
        def put_back(self, p):
            p.sub_(self.kept.pop(p)[1])


class RebindsData(Peer):
    """davda54/sam: `p.data = copy`, and only where there is a gradient in the second pass."""

    class habits(Textbook):
        def put_back(self, p):
            if p.grad is not None:
                p.data = self.kept.pop(p)[0]


class DenseMask(Peer):
    """Sparse-SAM: a mask as large as the weights, and the norm of the whole gradient."""

    class habits(Textbook):
        def eps(self, p, rho, norm):
            name = next(name for name, q in self.model.named_parameters() if q is p)
            mask = torch.zeros_like(p)
            if self.only is None:
                mask.fill_(1)
            elif name in self.only:
                mask[:, self.only[name]] = 1
            return super().eps(p, rho, norm) * mask


class ByName(Peer):
    """The published ShaPO code goes through the layers by name, so that a tied weight comes twice, as an index may."""

    class habits(Textbook):
        @torch.no_grad()
        def first_step(self, zero_grad=False):
            norm = self.norm()
            named = dict(self.model.named_parameters(remove_duplicate=False))
            moved = {name: self.eps(p, self.defaults["rho"], norm) for name, p in named.items() if p.grad is not None}
            for name, eps in moved.items():
                p = named[name]
                self.kept.setdefault(p, (p.clone(), eps))
                index = torch.tensor((self.only or {}).get(name, range(p.shape[-1])))
                p.index_add_(-1, index, eps.index_select(-1, index))
            self.zero_grad()


class SumsInHalf(Peer):
    """google-research/sam#3, davda54/sam#7: squares of float16 gradients overflow."""

    class habits(Textbook):
        def norm(self):
            return sum(p.grad.square().sum() for p, _ in self.held()).sqrt()


class OwnGroups(Peer):
    """composer: the wrapper's groups are copies of its base's."""

    class habits(Textbook):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.param_groups = [dict(group) for group in self.param_groups]


class ForgetsMomentum(Peer):
    """davda54/sam: a loaded state is the wrapper's own, and the base starts from nothing."""

    class habits(Textbook):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.base.param_groups = self.param_groups


class WaitsForTheDevice(Peer):
    """composer: whether the gradient is finite is asked on the host."""

    class habits(Textbook):
        def first_step(self, zero_grad=False):
            if self.norm().isfinite().item():
                super().first_step()
            self.zero_grad()


class Unscaled(Peer):
    """davda54/sam#97: a scaler that steps with a closure unscales before, not after: 1024 times too large."""

    def update_scaled(self, scaler, ascent, descent):
        losses = iter((ascent, ascent, descent))

        def closure():
            self.optimizer.zero_grad()
            scaler.scale(next(losses)()).backward()

        closure()
        scaler.step(self.optimizer, closure)
        scaler.update()


class ClosureClears(Peer):
    """A closure that clears gradients, as a SAM's must, under accumulation: the last micro-batch's alone is left."""

    def find(self, *losses):
        for loss in losses:
            self.optimizer.zero_grad()
            (loss() / len(losses)).backward()


class TogglesRequiresGrad(Peer):
    """ESAM: another half of the weights is perturbed in each update, the rest not required to have gradients."""

    def find(self, *losses):
        self.calls = getattr(self, "calls", 0) + 1
        parameters = list(self.model.parameters())
        for i, p in enumerate(parameters):
            p.requires_grad_(self.calls >> i & 1 == 0)
        super().find(*losses)
        for p in parameters:
            p.requires_grad_(True)


class RankLocalNorm(Peer):
    """davda54/sam and others under sharding: each rank divides by the norm of its own shard's gradient."""

    class habits(Textbook):
        def norm(self):
            shards = [getattr(p.grad, "_local_tensor", p.grad) for p, _ in self.held()]
            return torch.stack([shard.double().norm() for shard in shards]).norm()
