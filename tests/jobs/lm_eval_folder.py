"""A folder of small lm-eval tasks over local data, as a user would write them; made up for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

COLOURS = ["amber", "cobalt", "crimson", "ivory", "jade", "lilac", "ochre", "teal"]

# A scorer of one's own: the share of the target's letters that the answer starts with.
SCORER = """
def process_results(doc, results):
    said, target = results[0].strip(), doc["answer"]
    same = 0
    while same < min(len(said), len(target)) and said[same] == target[same]:
        same += 1
    return {"begins": same / len(target), "characters": len(said)}
"""


def documents(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Facts and a question about one of them."""
    made = []
    for number in range(first, first + count):
        colours = [COLOURS[(number + i) % len(COLOURS)] for i in range(4)]
        facts = " ".join(f"The code of lamp{i} is {colour}." for i, colour in enumerate(colours))
        made.append({"facts": facts, "lamp": f"lamp{number % 4}", "answer": colours[number % 4]})
    return made


class Function(str):
    """A value that YAML writes as `!function`."""


yaml.SafeDumper.add_representer(
    Function, lambda dumper, value: dumper.represent_scalar("!function", str(value))
)


class TaskFolder:
    """`path` holds the tasks' YAML files, the data and the scorer; `add` writes one more task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.write_documents("test", documents(6))
        self.write_documents("train", documents(5, first=6))
        (path / "scorer.py").write_text(SCORER)

    def write_documents(self, split: str, made: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(document) + "\n" for document in made)
        (self.path / f"{split}.jsonl").write_text(lines)

    def add(self, name: str, **changes: Any) -> str:
        """A task of exact matches; `changes` replace keys of its YAML, None removes one."""
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(self.path / f"{split}.jsonl") for split in ("test", "train")},
                "cache_dir": str(self.path / "cache"),
            },
            "test_split": "test",
            "fewshot_split": "train",
            "doc_to_text": "{{facts}}\nQuestion: What is the code of {{lamp}}?\nAnswer:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12, "do_sample": False},
            "filter_list": [
                {"name": "word", "filter": [{"function": "regex", "regex_pattern": "[a-z]+"}, _FIRST]},
                {"name": "whole", "filter": [_FIRST]},
            ],
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 3},
        }
        task = {key: value for key, value in {**task, **changes}.items() if value is not None}
        (self.path / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
        return name

    def add_scored(self, name: str, **changes: Any) -> str:
        """A task whose scorer is a function beside it."""
        metrics = [
            {"metric": "characters", "aggregation": "mean", "higher_is_better": False},
            {"metric": "begins", "aggregation": "mean", "higher_is_better": True},
        ]
        scorer = Function("scorer.process_results")
        return self.add(name, process_results=scorer, metric_list=metrics, **changes)

    def entry(self, *names: str, **params: Any) -> dict[str, Any]:
        """What a sweep's `tasks` lists."""
        return {"name": "lm_eval", "tasks": list(names), "include_path": str(self.path), **params}


_FIRST = {"function": "take_first"}
