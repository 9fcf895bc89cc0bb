"""The settings of a study, and the plans that are shipped; `jobs` makes a list of jobs of one.

The names of subspaces say what they are:

    all, neurons                every parameter; every neuron
    gradient-P, probe-P         the share P (%) with the largest gradient of the preference loss; the published choice
    opposite-P                  the other end of the probe's ranking
    benign-P                    the largest gradient of a language-modelling loss on answers to harmless prompts
    random-P-S                  drawn over all layers with the seed S
    like-NAME-S                 as many of each layer as the subspace NAME has
    outliers                    the `OUTLIERS` neurons with the largest gradient of the preference loss
    gradient-P-rest             gradient-P without them
    layers-A-B                  all neurons of the layers A to B
    head                        the output projection, where it gives the logits: a tied embedding is not moved
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shapo.checked import checked

__all__ = ["OUTLIERS", "PLANS", "Plan"]

OUTLIERS = 2

# Without the standing system turn of SmolLM2's own template, which takes a quarter of a short text.
PLAIN_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@checked
@dataclass(frozen=True)
class Plan:
    """Sizes and grids.

    Attributes:
        max_length, max_prompt_length: Tokens, of prompt and response and of the prompt.
        template: A chat template instead of the model's own.
        figure_pairs: Pairs of each of the two tests in domain and unseen, for Figure 1.
        match_pairs: Selection pairs at which radii are matched and the common yardstick is measured.
        watch_pairs: Selection pairs watched in training, for the choice of learning rate and stop.
        test_pairs: Of each test.
        train_pairs: Drawn anew by each seed.
        benign_texts: Answers to harmless prompts, half to select by and half to measure on.
        layers: Of the model, for the thirds of `figure_spaces`.
        figure_spaces, figure_rhos: Figure 1; the first spaces matter most.
        steps: Ascent steps of the adversary of several steps.
        targets: Loss increases (nats) that radii are matched at; the first one matters most.
        watch_every: Updates.
        yardstick: Radius in all parameters for the final models; 0 leaves it out.
        tuning_seeds: Draws of training pairs that the learning rate is chosen on, and nothing else; with them
            the plan is the small one of `_small`.
        wider: Larger loss increases, of which the selection split chooses one for a second round, as "NAME-wide".
        slower: Lower learning rates, tried for the plain method on the tuning draws; the rate that is best with them
            is a control for the wide round, as "NAME-slower".
        rewards: Also the reward level, as "NAME-reward": soft labels by a head fitted to the selection split.
        aligned: Figure 1 also at the first seed's models after DPO and after the gradient's ShaPO.
        head: Also the output projection alone, at the wider increase.
        tuned_losses: Also rDPO and Dr.DPO with a parameter that the selection split chooses, as "NAME-tuned".
        answer_tokens: Of an answer, where the start and the first seed's models are to answer prompts; 0 for none.
    """

    max_length: int = 80
    max_prompt_length: int = 58
    figure_pairs: int = 12
    match_pairs: int = 8
    watch_pairs: int = 24
    test_pairs: int = 24
    train_pairs: int = 40
    benign_texts: int = 64
    layers: int = 30
    percent: float = 1.0
    figure_rhos: tuple[float, ...] = (0.03, 0.1, 0.3)
    steps: int = 3
    targets: tuple[float, ...] = (0.2, 0.05)
    batch_size: int = 8
    updates: int = 16
    watch_every: int = 8
    warmup: int = 4
    lrs: tuple[float, ...] = (1e-4, 3e-5)
    noises: tuple[float, ...] = (0.4, 0.2, 0.0)
    seeds: int = 5
    beta: float = 0.1
    yardstick: float = 0.01
    bf16: bool = True
    short: bool = False
    template: str | None = None
    tuning_seeds: tuple[int, ...] = ()
    wider: tuple[float, ...] = ()
    slower: tuple[float, ...] = ()
    rewards: bool = False
    aligned: bool = False
    head: bool = False
    tuned_losses: bool = False
    answer_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan of which `as_dict` gave the values."""
        tuples: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**tuples)


PLANS = {
    "study": Plan(),
    "cpu": Plan(
        max_length=60,
        max_prompt_length=44,
        template=PLAIN_CHATML,
        train_pairs=32,
        targets=(0.2,),
        updates=8,
        watch_every=4,
        warmup=2,
        lrs=(2e-5, 1e-5),
        noises=(0.4, 0.2, 0.0),
        seeds=5,
        yardstick=0.0,
        tuning_seeds=(100,),
        wider=(0.8, 2.0),
        slower=(5e-6, 2.5e-6),
        rewards=True,
        aligned=True,
        head=True,
        tuned_losses=True,
        answer_tokens=40,
    ),
    "real": Plan(lrs=(3e-5,), noises=(0.3,), seeds=1, targets=(0.2,), short=True),
}
