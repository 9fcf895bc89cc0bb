"""Tasks of lm-eval (EleutherAI's evaluation harness) on a model in memory: what alignment costs elsewhere.

`pip install shapo-kernels[harness]`. The results are lm-eval's own: metric, standard error, task version, number of
cases.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from shapo.checked import checked
from shapo.errors import UserError, first_line


def require_lm_eval() -> None:
    """Raises UserError where lm-eval is not installed: to be asked before anything takes long."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("--lm-eval needs the package lm-eval; `pip install shapo-kernels[harness]`") from error


@checked
def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    chat_template: bool = False,
) -> dict[str, Any]:
    """`simple_evaluate` of the tasks by their names.

    Args:
        folder: Task files of the user's own, beside lm-eval's.
        limit: The first cases of each task alone; what is then measured is no benchmark's number.
        chat_template: Render requests by the tokenizer's chat template.

    Returns:
        By task (and group): metrics and their standard errors by "metric,filter", version, cases.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown or cannot be run.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=os.fspath(folder) if folder else None)
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        raise UserError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, --lm-eval-path adds yours")
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        results = simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat_template,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, ConnectionError) as error:
        raise UserError(f"lm-eval cannot get the tasks' data: {first_line(error)}") from error
    return {name: _entry(name, values, results) for name, values in results["results"].items()}


def _entry(name: str, values: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float)) and "," in key}
    return {
        "metrics": {key: value for key, value in numbers.items() if "_stderr" not in key},
        "standard_errors": {key: value for key, value in numbers.items() if "_stderr" in key},
        "version": results.get("versions", {}).get(name),
        "cases": results.get("n-samples", {}).get(name, {}).get("effective"),
    }
