"""Tensors of every kind of memory for hypothesis, and what a call makes of them."""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

F64, INF, IGNORE = torch.float64, math.inf, -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16, F64]
REFUSED = (TypeError, ValueError, IndexError)
# The same draws in every run: a change that breaks one breaks it for everybody.
fuzzed = settings(max_examples=100, deadline=None, derandomize=True)
sizes = st.sampled_from([0, 1, 2, 3, 5])


class Draw:
    """Draws tensors."""

    def __init__(self, data):
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def one(self, *choices):
        return self.data.draw(st.sampled_from(choices))

    def tensor(self, *shape, dtype=torch.float32, special=False):
        """In memory of some kind: views, expanded and overlapping ones among them."""
        kind = self.one("plain", "plain", "transposed", "strided", "sliced", "expanded", "overlapping")
        if kind == "expanded" and shape[0] > 1:
            return self._filled(1, *shape[1:], dtype=dtype, special=special).expand(shape)
        if kind == "overlapping" and len(shape) == 2 and min(shape) > 1:
            return self._filled(sum(shape), dtype=dtype, special=special).unfold(0, shape[1], 1)[: shape[0]]
        if kind == "transposed" and len(shape) > 1:
            return self._filled(*shape[:-2], shape[-1], shape[-2], dtype=dtype, special=special).transpose(-1, -2)
        if kind == "strided":
            return self._filled(*shape[:-1], 2 * shape[-1], dtype=dtype, special=special)[..., ::2]
        if kind == "sliced":
            return self._filled(shape[0] + 1, *shape[1:], dtype=dtype, special=special)[1:]
        return self._filled(*shape, dtype=dtype, special=special)

    def _filled(self, *shape, dtype, special):
        values = torch.randn(shape, generator=self.generator, dtype=F64)
        if special:
            chance = torch.rand(shape, generator=self.generator)
            for place, value in enumerate((INF, -INF, math.nan, 0.0, 1e4)):
                values = torch.where((chance > place / 15) & (chance < (place + 1) / 15), value, values)
        return values.to(dtype)

    def index(self, neurons, count):
        """Mostly in range; a neuron may come twice."""
        index = torch.randint(0, max(neurons, 1), (count,), generator=self.generator)
        if count and self.one(*[False] * 9, True):
            index[0] = self.one(neurons, -1, 2**40)
        return index

    def elsewhere(self, *tensors):
        """Once in a while one of the tensors is on another device."""
        moved = self.data.draw(st.integers(-30, len(tensors) - 1))
        return [t.to("meta") if number == moved else t for number, t in enumerate(tensors)]


def outcome(call, *inputs):
    """What a call gives, or `None` for a refusal, which must have changed no input."""
    here = [x for x in inputs if not x.is_meta]
    before = [x.clone() for x in here]
    try:
        return call()
    except REFUSED:
        assert all(torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0)) for x, old in zip(here, before, strict=True))
        return None


def assert_near(got, expected, dtype, scale=1.0):
    """Within some rounding errors of numbers of the size `scale`; infinities and NaNs where they are expected."""
    room = 32 * max(torch.finfo(dtype).eps, 1e-7 if dtype != F64 else 0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=room, atol=room * scale, equal_nan=True)


def in_range(index, neurons):
    return not len(index) or (int(index.min()) >= 0 and int(index.max()) < neurons)
