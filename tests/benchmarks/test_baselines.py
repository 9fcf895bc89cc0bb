"""What ours is held against computes the same thing."""

import pytest
import torch

from benchmarks.baselines import IGNORE, eager, peers

ROWS, TOKENS, VOCABULARY, WIDTH = 4, 12, 50, 8


def dpo(sums):
    chosen, rejected = sums.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.fixture
def head():
    torch.manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    labels[:, :3] = IGNORE
    hidden, weight = torch.randn(ROWS, TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def test_eager_is_the_sum_of_log_probabilities_of_counted_tokens(head):
    hidden, weight, labels = head
    logits = hidden @ weight.t()
    expected = [
        sum(torch.log_softmax(logits[row, at - 1].double(), 0)[labels[row, at]] for at in range(3, TOKENS))
        for row in range(ROWS)
    ]
    torch.testing.assert_close(eager(logits, labels).double(), torch.stack(expected), rtol=1e-5, atol=0)


def test_every_installed_peer_has_the_loss_and_the_gradients_of_the_plain_head(head):
    hidden, weight, labels = head
    found = peers(hidden, weight, labels, dpo)
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        assert "torch, chunked linear_cross_entropy" in found
    found.pop("cut-cross-entropy", None)  # compiles for minutes on a CPU
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = dpo(eager(exact[0] @ exact[1].t(), labels))
    gradients = torch.autograd.grad(truth, exact)
    for name, way in found.items():
        value = way()
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6, msg=name)
        for got, expected in zip(torch.autograd.grad(value, (hidden, weight)), gradients, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6, msg=name)
