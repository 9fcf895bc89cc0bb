"""Judges of answers: `load_judge` finds one by its name.

Generative guards are in one small module each (their published prompt and the reader of their output); classifiers,
refusal by substring, functions and judgezoo's judges stand beside them. docs/evaluation.md says which have been run
for real.
"""

from __future__ import annotations

from typing import Any

from shapo.errors import UserError
from shapo.judges import (
    granite_guardian,
    harmbench,
    llama_guard,
    md_judge,
    nemotron,
    qwen3guard,
    shieldgemma,
    wildguard,
)
from shapo.judges.base import Family, Judge, Label, Verdict
from shapo.judges.refusal import RefusalJudge

__all__ = ["FAMILIES", "NAMES", "Family", "Judge", "Label", "Verdict", "load_judge"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        md_judge.FAMILY,
        nemotron.FAMILY,
        llama_guard.FAMILY_3,
        llama_guard.FAMILY_4,
        wildguard.FAMILY,
        harmbench.FAMILY,
        qwen3guard.FAMILY,
        granite_guardian.FAMILY,
        shieldgemma.FAMILY,
    )
}

NAMES = (*FAMILIES, "classifier", "probe", "refusal-substring")
"""Beside these: judgezoo:NAME and module:function."""


def load_judge(
    name: str,
    model: str | None = None,
    *,
    probe: str | None = None,
    unsafe_label: str | None = None,
    threshold: float = 0.5,
    batch_size: int = 8,
    max_length: int = 4096,
    dtype: str = "float32",
    device: str = "auto",
    encoder: dict[str, Any] | None = None,
) -> Judge:
    """A judge by its name.

    Args:
        name: One of `NAMES`, judgezoo:NAME, or module:function.
        model: Folder or hub name of the guard or classifier.
        probe: The file of the probe (`name` is "probe").
        unsafe_label: Of a classifier; see `ClassifierJudge`.
        threshold: Harm from which on a classifier's or a probe's answer is unsafe.
        batch_size, max_length, dtype, device: Of the model.
        encoder: Options of the probe's `PairEncoder`.

    Raises:
        UserError: An unknown name, a threshold out of range, a model that is missing or not asked for, or one that
            cannot be loaded.
    """
    if not 0 < threshold < 1:
        raise UserError(f"the threshold is {threshold}, but a number between 0 and 1 is expected")
    if name == "refusal-substring" or ":" in name:
        if model:
            raise UserError(f"the judge {name} takes no --model")
        return _without_model(name, threshold)
    if name not in NAMES:
        raise UserError(f"unknown judge {name!r}: choose {', '.join(NAMES)}, judgezoo:NAME or module:function")
    if not model:
        raise UserError(f"the judge {name} needs its model; name a folder or a hub name with --model")
    if (name == "probe") != bool(probe):
        raise UserError("--judge probe and --probe FILE go together")
    from shapo.models import loading

    where: dict[str, Any] = {"dtype": dtype, "device": device}
    if name == "classifier":
        from shapo.judges.classifiers import ClassifierJudge

        return ClassifierJudge(
            loading.load_model(model, kind="AutoModelForSequenceClassification", **where),
            loading.load_tokenizer(model),
            unsafe=unsafe_label,
            threshold=threshold,
            batch_size=batch_size,
            max_length=max_length,
        )
    if name == "probe":
        from shapo.data.tokens import PairEncoder
        from shapo.judges.classifiers import ProbeJudge
        from shapo.probe import Probe

        loaded = loading.load_model(model, **where)
        template = PairEncoder(loading.load_tokenizer(model), **(encoder or {}))
        return ProbeJudge(loaded, template, Probe.load(probe or ""), threshold, batch_size)
    from shapo.judges.generative import GenerativeJudge

    loaded = loading.load_model(model, **where)
    guard = loading.load_tokenizer(model)
    return GenerativeJudge(FAMILIES[name], loaded, guard, batch_size=batch_size, max_length=max_length)


def _without_model(name: str, threshold: float) -> Judge:
    from shapo.judges.others import JudgeZooJudge, import_judge

    if name == "refusal-substring":
        return RefusalJudge()
    if name.startswith("judgezoo:"):
        return JudgeZooJudge(name.removeprefix("judgezoo:"), threshold=threshold)
    return import_judge(name)
