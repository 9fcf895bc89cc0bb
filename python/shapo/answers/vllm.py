"""Decoding by vLLM, for those who have a GPU it supports: `pip install vllm`. Prompts are the same token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shapo.answers.decoding import Completion, Request, cut
from shapo.answers.turns import Ending
from shapo.errors import UserError

CHUNK = 256
"""Requests handed over at once, so that an interrupted run has something to go on from."""


def require_vllm() -> Any:
    """The package; raises UserError where it is not installed."""
    try:
        import vllm
    except ImportError as error:
        raise UserError("--engine vllm needs the package vllm and a GPU; `pip install vllm`, or use hf") from error
    return vllm


class VLLMEngine:
    """A model folder served by vLLM in this process. Greedy at temperature 0, a seed a request otherwise.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        end: Ending,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        dtype: str = "auto",
    ) -> None:
        vllm = require_vllm()
        self._vllm, self.end, self.max_new_tokens, self.temperature = vllm, end, max_new_tokens, temperature
        # "vllm": vLLM's own defaults, not those of the model's generation_config.
        self.engine = vllm.LLM(model=model, dtype=dtype, generation_config="vllm")

    def complete(
        self, requests: Sequence[Request], done: Callable[[list[int], list[Completion]], None] | None = None
    ) -> list[Completion]:
        results: list[Completion] = []
        for start in range(0, len(requests), CHUNK):
            part = requests[start : start + CHUNK]
            outputs = self.engine.generate(
                [{"prompt_token_ids": request.ids} for request in part],
                [self._parameters(request) for request in part],
                use_tqdm=False,
            )
            completions = [self._completion(output.outputs[0]) for output in outputs]
            results += completions
            if done:
                done(list(range(start, start + len(part))), completions)
        return results

    def _parameters(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            temperature=self.temperature,
            seed=request.seed if self.temperature > 0 else None,
            max_tokens=self.max_new_tokens,
            stop_token_ids=list(self.end.ids),
            stop=list(self.end.texts) or None,
            skip_special_tokens=True,
        )

    def _completion(self, output: Any) -> Completion:
        text, _ = cut(output.text, self.end)
        return Completion(text, output.finish_reason == "stop", len(output.token_ids))
