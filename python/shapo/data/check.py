"""What to know of pairs before they are trained on: duplicates, leaks, lengths, cuts, balance, the tokens learned.

Counts alone; nothing is changed or left out. Lengths are tokens where there is an encoder, else characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shapo.data.pairs import PairSet, PreferencePair

if TYPE_CHECKING:
    from shapo.data.tokens import Encoded, PairEncoder

__all__ = ["check_pairs", "render_pair", "report_lines"]

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def check_pairs(
    pairs: PairSet, *, against: PairSet | None = None, encoder: PairEncoder | None = None
) -> dict[str, Any]:
    """Counts of `pairs`, as plain numbers for JSON.

    Args:
        pairs: the set.
        against: another one, say for evaluation, whose prompts should not be among these.
        encoder: the template and the lengths of training.

    Returns:
        `pairs`, `dropped`; `duplicates`: pairs that occur more than once, pairs that also occur with their
        labels swapped, prompts of more than one pair; `in_common` with `against`: pairs and prompts; `prefixes`: rows
        whose transcripts differ before the answer, answers that begin with their prompt; `lengths`: quantiles of
        prompt, chosen and rejected; with an encoder `cut`: prompts, responses, and pairs that are equal after the cut;
        `balance`: share of the pairs whose chosen response is the longer one, safety flags, categories.

    Raises:
        UserError: the encoder refuses a pair.
    """
    lengths, cut = _measured(pairs, encoder)
    chosen, rejected = lengths["chosen"], lengths["rejected"]
    longer = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    equal = sum(a == b for a, b in zip(chosen, rejected, strict=True))
    report: dict[str, Any] = {
        "source": pairs.source,
        "format": pairs.format,
        "messages": pairs.messages,
        "pairs": len(pairs),
        "dropped": dict(sorted(pairs.dropped.items())),
        "duplicates": _duplicates(pairs),
        "prefixes": {
            "rows_whose_transcripts_differ": pairs.dropped.get("whose transcripts differ before the last answer", 0),
            "answers_that_begin_with_their_prompt": sum(_repeats_prompt(pair) for pair in pairs),
        },
        "unit": "characters" if encoder is None else "tokens",
        "lengths": {name: _quantiles(values) for name, values in lengths.items()},
        "balance": {
            "chosen_longer": longer / len(pairs),
            "equally_long": equal / len(pairs),
            "chosen_unsafe": _flags(pair.chosen_unsafe for pair in pairs),
            "rejected_unsafe": _flags(pair.rejected_unsafe for pair in pairs),
            "categories": dict(Counter(pair.category for pair in pairs).most_common()),
        },
    }
    if encoder is not None:
        report["cut"] = cut
    if against is not None:
        report["in_common"] = {"source": against.source, **_in_common(pairs, against)}
    return report


def _measured(pairs: PairSet, encoder: PairEncoder | None) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Lengths of every prompt and response before any cut, and what is cut."""
    if encoder is None:
        return {name: [len(getattr(pair, name)) for pair in pairs] for name in ("prompt", "chosen", "rejected")}, {}
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    cut = {"max_length": encoder.max_length, "pairs": 0, "prompts": 0, "responses": 0, "equal_after_the_cut": 0}
    texts = [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    for both in encoder.each_pair(texts):
        lengths["prompt"].append(both[0].prompt_length + both[0].prompt_cut)
        for name, one in zip(("chosen", "rejected"), both, strict=True):
            lengths[name].append(len(one) - one.prompt_length + one.response_cut)
        responses = sum(one.response_cut > 0 for one in both)
        cut["prompts"] += both[0].prompt_cut > 0
        cut["responses"] += responses
        cut["pairs"] += both[0].prompt_cut > 0 or responses > 0
        cut["equal_after_the_cut"] += both[0].input_ids == both[1].input_ids
    return lengths, cut


def _duplicates(pairs: Sequence[PreferencePair]) -> dict[str, int]:
    seen = Counter((pair.prompt, pair.chosen, pair.rejected) for pair in pairs)
    prompts = Counter(pair.prompt for pair in pairs)
    return {
        "pairs": sum(count - 1 for count in seen.values()),
        "with_exchanged_labels": sum((prompt, rejected, chosen) in seen for prompt, chosen, rejected in seen) // 2,
        "prompts_of_several_pairs": sum(count > 1 for count in prompts.values()),
        "prompts": len(prompts),
    }


def _in_common(pairs: PairSet, against: PairSet) -> dict[str, int]:
    prompts = {pair.prompt for pair in against}
    whole = {(pair.prompt, frozenset((pair.chosen, pair.rejected))) for pair in against}
    return {
        "prompts": len(prompts & {pair.prompt for pair in pairs}),
        "pairs_with_such_a_prompt": sum(pair.prompt in prompts for pair in pairs),
        "pairs": sum((pair.prompt, frozenset((pair.chosen, pair.rejected))) in whole for pair in pairs),
    }


def _repeats_prompt(pair: PreferencePair) -> bool:
    return bool(pair.prompt) and pair.chosen.startswith(pair.prompt) and pair.rejected.startswith(pair.prompt)


def _quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in _QUANTILES.items()}


def _flags(flags: Any) -> dict[str, int]:
    counts = Counter(flags)
    return {"yes": counts[True], "no": counts[False], "unknown": counts[None]}


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people; a line that starts with "!" wants to be looked at."""
    total, unit = report["pairs"], report["unit"]
    lines = [f"{total} pairs from {report['source']}, read as {report['format']}"]
    lines += [f"  left out: {count} {reason}" for reason, count in report["dropped"].items()]
    double, prefixes = report["duplicates"], report["prefixes"]
    lines += [
        _marked(double["pairs"], "pairs occur more than once"),
        _marked(double["with_exchanged_labels"], "pairs also occur with their labels swapped"),
        f"  {double['prompts']} prompts, {double['prompts_of_several_pairs']} of them in several pairs",
        _marked(prefixes["rows_whose_transcripts_differ"], "rows were left out: their transcripts differ too early"),
        _marked(prefixes["answers_that_begin_with_their_prompt"], "pairs whose answers begin with their prompt"),
    ]
    for name, values in report["lengths"].items():
        lines.append(f"  {unit} of {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if "cut" in report:
        cut = report["cut"]
        what = f"pairs are cut to {cut['max_length']} tokens: {cut['prompts']} prompts, {cut['responses']} responses"
        lines += [_marked(cut["pairs"], what), _marked(cut["equal_after_the_cut"], "pairs are equal after the cut")]
    balance = report["balance"]
    lines.append(f"  the chosen response is longer in {100 * balance['chosen_longer']:.1f} % of the pairs")
    for side in ("chosen", "rejected"):
        flags = balance[f"{side}_unsafe"]
        lines.append(f"  {side} unsafe: {flags['yes']}, safe: {flags['no']}, unknown: {flags['unknown']}")
    named = {name or "(none)": count for name, count in balance["categories"].items()}
    lines.append("  categories: " + ", ".join(f"{name} {count}" for name, count in list(named.items())[:8]))
    if "in_common" in report:
        common = report["in_common"]
        lines += [
            _marked(common["pairs_with_such_a_prompt"], f"pairs have a prompt of {common['source']}"),
            _marked(common["pairs"], "of them with the same two responses"),
        ]
    return lines


def _marked(count: int, what: str) -> str:
    return f"{'!' if count else ' '} {count} {what}"


def render_pair(pair: PreferencePair, encoder: PairEncoder) -> list[str]:
    """Both texts as the model sees them, what is trained between « and », special tokens written out."""
    lines = []
    for name, one in zip(
        ("chosen", "rejected"), encoder.encode_pair(pair.prompt, pair.chosen, pair.rejected), strict=True
    ):
        lines.append(f"{name} ({one.prompt_length} tokens of prompt, {len(one) - one.prompt_length} learned):")
        lines += _text_of(one, encoder).split("\n")
    return lines


def _text_of(encoded: Encoded, encoder: PairEncoder) -> str:
    prompt, learned = encoded.input_ids[: encoded.prompt_length], encoded.input_ids[encoded.prompt_length :]
    decode = encoder.tokenizer.decode
    return f"{decode(prompt)}«{decode(learned)}»"
