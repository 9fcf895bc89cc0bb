"""The model card: README.md beside a trained model, what it was made from and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shapo.errors import UserError, first_line
from shapo.storage.files import write_text

_LIMITS = """\
## Limits

The numbers above are of the pairs named above, by log-probabilities; they do not say how the model answers. Preference
training lowers the rate of some unsafe answers and proves nothing about the others: measure the answers themselves
(`shapo evaluate --prompts`, `shapo judge`) before the model is used.
"""


def write_card(
    folder: Path, *, title: str, recipe: Mapping[str, Any], numbers: Mapping[str, Any], versions: Mapping[str, Any]
) -> Path:
    """Writes `folder`/README.md: base, data, numbers, limits, recipe. `huggingface_hub.ModelCard` reads it.

    Args:
        folder: The model's.
        title: What was done, as a noun.
        recipe: The command's options.
        numbers: What was measured, flat.
        versions: Name of a library -> version.
    """
    import yaml
    from huggingface_hub import ModelCardData

    base, data = str(recipe["model"]), recipe["data"]
    sources = [str(source) for source in (data if isinstance(data, list) else [data])]
    tags = ["shapo", *(["shapo-perturbed"] if recipe.get("rho") is not None else [])]
    on_hub = not Path(base).exists()
    header = ModelCardData(library_name="transformers", tags=tags, base_model=base if on_hub else None)
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in numbers.items())
    text = f"""\
---
{header.to_yaml()}
---

# {title}

Made with shapo (ShaPO, arXiv:2602.07340).

* Base model: `{base}`
* Data: {", ".join(f"`{source}`" for source in sources)}
* Evaluation data: {f"`{recipe['eval_data']}`" if recipe.get("eval_data") else "none"}
* Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}

## Numbers

| | |
| :-- | --: |
{rows or "| none | |"}

{_LIMITS}
## Recipe

```yaml
{yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)}```
"""
    path = folder / "README.md"
    write_text(path, text)
    return path


def push(folder: Path, repository: str) -> str:
    """Uploads a model's folder to the hub, into a private repository if there is none, and returns its address.

    Raises:
        UserError: Not logged in, no such name, no connection.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by shapo")
    except Exception as error:  # the hub's, httpx's, validation's
        raise UserError(
            f"cannot push to {repository}: {first_line(error)}; the model is in {folder}, `hf upload {repository} "
            f"{folder}` tries again"
        ) from error
    return str(address)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
