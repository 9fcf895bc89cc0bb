"""Preference data: records, file formats, label noise, tokenisation and the project's own generated data set."""

from shapo.data.formats import load_pairs, load_prompts
from shapo.data.mixture import load_mixture
from shapo.data.noise import flip_labels
from shapo.data.pairs import EvaluationPrompt, PairSet, PreferencePair, PromptSet
from shapo.data.tokens import Encoded, PairEncoder

__all__ = [
    "Encoded",
    "EvaluationPrompt",
    "PairEncoder",
    "PairSet",
    "PreferencePair",
    "PromptSet",
    "flip_labels",
    "load_mixture",
    "load_pairs",
    "load_prompts",
]
