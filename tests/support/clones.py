"""Clones of the two repositories that `shapo safety-pairs` reads, made up."""

import json

from shapo.data.safety_pairs import LEFT_OUT, UNSEEN

CATEGORIES = ("Fraud/Deception", "Malware/Hacking", *UNSEEN, *LEFT_OUT)
PROMPTS = [(category, f"Question {number} about {category}") for category in CATEGORIES for number in range(10)]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def judged(text, matching, guard):
    return {"response": text, "is_jailbreak_substring_matching": int(matching), "is_jailbreak_llamaguard2": int(guard)}


def make_clones(folder):
    """The paths of both, below `folder`."""
    refusal, artifacts = folder / "refusal_direction", folder / "artifacts"
    kinds = {"baseline": ("no", 0, 0), "ablation": ("yes", 1, 1), "actadd": ("perhaps", 1, 0)}
    for model in ("one", "two"):
        runs = refusal / "pipeline/runs" / model / "completions"
        for kind, (word, matching, guard) in kinds.items():
            asked = [
                {"prompt": p, "category": c, **judged(f"{word},  {model}\nsaid of {p}", matching, guard)}
                for c, p in PROMPTS
            ]
            write(runs / f"jailbreakbench_{kind}_evaluations.json", {"completions": asked})
        harmless = [{"prompt": f"Harmless {n}", "category": None, "response": f"{model} helps"} for n in range(3)]
        write(runs / "harmless_baseline_completions.json", harmless)
    for attack, judges in {
        "PAIR": {"jailbroken_llama_guard1": True},
        "DSN": {},
        "GCG": {"jailbroken_llama_guard1": False},
    }.items():
        broken = [
            {"goal": p, "category": c, "response": f"{attack} yes {p}", "jailbroken": True, **judges}
            for c, p in PROMPTS
        ]
        write(artifacts / "attack-artifacts" / attack / "white_box/vicuna.json", {"jailbreaks": broken})
    held = [{"goal": p, "category": c, "response": f"no {p}", "jailbroken": False} for c, p in PROMPTS]
    write(artifacts / "attack-artifacts/JBC/manual/llama.json", {"jailbreaks": [*held, {**held[0], "response": None}]})
    return refusal, artifacts
