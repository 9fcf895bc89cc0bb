"""Answers a minute of the default engine (transformers), prompts in a batch against one by one, and whether they agree.

    python -m benchmarks.answers --model SMOLLM2 --prompts selection.jsonl test.jsonl [--batch 16] [--tokens 32]

The first distinct prompts of the files, by the chat template, greedily in fp32 on all cores. Both ways are taken in
turn. Writes `benchmarks/results/answers.json`: counts and times, no text.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import rows


def sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What recorded rows say, for docs/evaluation.md."""
    batch, single = (next(row for row in rows if row["variant"] == name) for name in ("in a batch", "one by one"))
    slowest, fastest = (batch["prompts"] * 60e3 / batch[name] for name in ("p80_ms", "p20_ms"))
    return (
        f"{batch['case']}, on two cores: {batch['a_minute']:.0f} answers a minute in a batch, {single['a_minute']:.0f} "
        f"one by one, {batch['times_single']:.1f} times as many (medians of {batch['rounds']} rounds taken in turn; "
        f"between {slowest:.0f} and {fastest:.0f} in a batch). "
        f"{batch['same']} of {batch['prompts']} answers are the same."
    )


def main() -> None:
    from shapo.answers.decoding import Completion, TransformersEngine
    from shapo.answers.turns import ending
    from shapo.answers.writing import prompt_requests
    from shapo.data.formats import load_prompts
    from shapo.data.tokens import PairEncoder
    from shapo.models.loading import load_model, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", default="SmolLM2-135M-Instruct", help="of the model in the rows")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--batch", type=int, default=16, help="prompts in all, and in the batch")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = {p.prompt: p for path in arguments.prompts for p in load_prompts(path)}
    prompts = list(itertools.islice(found.values(), arguments.batch))
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    encoder = PairEncoder(tokenizer, chat_template=True)
    requests = prompt_requests(encoder, prompts, max_new_tokens=arguments.tokens)
    end = ending(tokenizer, model, chat_template=True)
    answers: dict[str, list[Completion]] = {}

    def answer(size: int) -> None:
        engine = TransformersEngine(model, tokenizer, end, max_new_tokens=arguments.tokens, batch_size=size)
        answers[str(size)] = engine.complete(requests)

    answer(arguments.batch)  # the first pass touches memory for the first time
    seconds = rows.interleaved(
        {"in a batch": lambda: answer(arguments.batch), "one by one": lambda: answer(1)},
        rounds=arguments.rounds,
        warmup=0,
    )
    batched, single = answers[str(arguments.batch)], answers["1"]
    ratio = rows.ratios(seconds, "in a batch")["one by one"]
    lengths = [len(request.ids) for request in requests]
    case = (
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"up to {arguments.tokens} new ones, {arguments.name}, fp32"
    )
    columns = {
        "prompts": len(prompts),
        "same": sum(one == other for one, other in zip(batched, single, strict=True)),
        "new_tokens": sum(completion.tokens for completion in single),
    }
    found_rows = []
    for variant, times in seconds.items():
        found_rows.append(rows.row("answers", case, variant, times, **columns))
        found_rows[-1]["a_minute"] = 60 * len(prompts) / (found_rows[-1]["p50_ms"] / 1e3)
        print(f"{variant}: {found_rows[-1]['a_minute']:.1f} answers a minute")
    print(f"{ratio:.2f} times as many in a batch; {columns['same']} of {len(prompts)} answers are the same")
    rows.write(
        "answers", [{**row, "times_single": ratio if row["variant"] == "in a batch" else 1.0} for row in found_rows]
    )


if __name__ == "__main__":
    main()
