"""What to know of pairs before they are trained on: duplicates, leaks, lengths, cuts, balance, the tokens learned.

Counts alone; nothing is changed or left out. Lengths are tokens where there is an encoder, else characters.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple

from shapo.data.pairs import PairSet, PreferencePair
from shapo.errors import UserError

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


class _Measure(NamedTuple):
    """Of a pair before any cut: tokens of prompt, chosen and rejected; and what is cut."""

    prompt: int
    chosen: int
    rejected: int
    prompts_cut: int
    responses_cut: int
    equal: bool


def _measured(pairs: PairSet, encoder: PairEncoder | None) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Lengths of every prompt and response before any cut, and what is cut."""
    names = ("prompt", "chosen", "rejected")
    if encoder is None:
        return {name: [len(getattr(pair, name)) for pair in pairs] for name in names}, {}
    found = _measures([(pair.prompt, pair.chosen, pair.rejected) for pair in pairs], encoder)
    cut = {
        "max_length": encoder.max_length,
        "pairs": sum(one.prompts_cut > 0 or one.responses_cut > 0 for one in found),
        "prompts": sum(one.prompts_cut for one in found),
        "responses": sum(one.responses_cut for one in found),
        "equal_after_the_cut": sum(one.equal for one in found),
    }
    return {name: [getattr(one, name) for one in found] for name in names}, cut


# The first pairs are read here, so that what a template warns of is said once; many more are divided over processes.
_FIRST, _MANY = 512, 4096


def _measures(texts: list[tuple[str, str, str]], encoder: PairEncoder) -> list[_Measure]:
    workers = min(os.cpu_count() or 1, 8)
    if len(texts) < _MANY or workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        return _measures_of(texts, encoder)
    found, rest = _measures_of(texts[:_FIRST], encoder), texts[_FIRST:]
    each = -(-len(rest) // workers)
    parts = [rest[start : start + each] for start in range(0, len(rest), each)]
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, context, initializer=_begin_worker) as pool:
            for part in pool.map(_measures_of, parts, [encoder] * len(parts)):
                found += part
    except (UserError, BrokenProcessPool, OSError):
        # One after the other: an error then names the pair by its place among all of them.
        return _measures_of(texts, encoder)
    return found


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell of
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a tokenizer do not outlive a fork


def _measures_of(texts: Sequence[tuple[str, str, str]], encoder: PairEncoder) -> list[_Measure]:
    found = []
    for chosen, rejected in encoder.each_pair(texts):
        first, second = (len(one) - one.prompt_length + one.response_cut for one in (chosen, rejected))
        responses = sum(one.response_cut > 0 for one in (chosen, rejected))
        equal = chosen.input_ids == rejected.input_ids
        prompt = chosen.prompt_length + chosen.prompt_cut
        found.append(_Measure(prompt, first, second, int(chosen.prompt_cut > 0), responses, equal))
    return found


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
    """The report for people; a line that starts with "!" needs a look."""
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
