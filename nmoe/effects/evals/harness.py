"""`nmoe eval --lm-eval`: tasks of lm-eval (EleutherAI's lm-evaluation-harness), scored by our own model class.

The package is imported when the verb is called: it is the extra `eval`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nmoe.effects.data.tokenizer import Tokenizer, encoding
from nmoe.effects.evals.judge import rows, scored
from nmoe.effects.record import scores as score_file
from nmoe.effects.terminal import say, say_json, table
from nmoe.effects.train import generate
from nmoe.effects.train.generate import Network, open_network
from nmoe.errors import InputError, pip_install, printable
from nmoe.pure.core.key import Key
from nmoe.pure.evals.score import Score
from nmoe.pure.evals.score import rows as score_rows
from nmoe.pure.model.decode import Sampling

MAX_TOKENS = 256
"""Tokens of a generated answer, where a task says nothing: what lm-eval's own classes take."""

PROMPTS = 16
"""Prompts that are continued together."""

TASK_ERRORS = (ArithmeticError, AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What lm-eval and the library of its data sets raise for a task they cannot load."""


def main(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> int:
    """Judge the model in `folder` by tasks of lm-eval, print its scores, and keep them there.

    tasks    names of tasks or groups, patterns allowed
    include  folder of tasks as YAML files, in the place of lm-eval's own
    shots    examples in a prompt; None: as the task says
    limit    items of a task at most; None: all
    Writes:  `folder`/evals.json, as `lm-eval/<task>/<metric>`
    Raises:  InputError without the package, for tasks that it does not know or cannot load, and as `open_network`.
    """
    if limit is not None and limit < 2:
        raise InputError(f"--limit: expected at least 2, got {limit}; a standard error needs two items")
    evaluator, manager, loaded = _load(tasks, include)
    score_file.read(folder)  # a damaged file is refused before the work
    model = model_of(*open_network(folder, device))
    about = {"num_fewshot": shots, "limit": limit, "log_samples": False}
    found = evaluator.simple_evaluate(model=model, tasks=loaded, task_manager=manager, **about)
    scores = scores_of(found)
    kept = score_file.keep(folder, scores)
    if as_json:
        say_json(kept)
        return 0
    say(table(("task", "score", "std error", "items"), score_rows(scores), left=1))
    return 0


def _load(tasks: Sequence[str], include: Path | None) -> tuple[Any, Any, list[Any]]:
    """lm-eval's evaluator, its manager of tasks, and these tasks and groups of tasks. Raises: InputError."""
    if include is not None and not include.is_dir():
        raise InputError(f"--tasks: expected a folder of YAML files, got {include}; name one")
    try:
        evaluator = importlib.import_module("lm_eval.evaluator")
        managers = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise InputError(
            f"--lm-eval: expected the extra `eval`, got {error}; install it with: {pip_install('eval')}"
        ) from error
    # lm-eval's own are 14,000 files, which take 10 s to read; a folder of one's own does not need them.
    manager = managers.TaskManager(include_path=include and str(include), include_defaults=include is None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"--lm-eval: expected tasks of lm-eval, got {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
            "with --tasks those of that folder are known alone"
        )
    loaded: list[Any] = []
    for name in manager.match_tasks(list(tasks)):
        try:
            found = manager.load([name])
        except TASK_ERRORS as error:
            problem = printable(str(error).partition("\n")[0])
            raise InputError(
                f"--lm-eval: expected a task with its data, got {type(error).__name__} for {name}: {problem}; most "
                "tasks fetch their data from the Hub when they are first used"
            ) from error
        loaded += (found["groups"] or found["tasks"]).values()
    try:
        manager.load(loaded)
    except ValueError as error:  # of a task that is asked for by itself and in a group
        raise InputError(
            f"--lm-eval: expected each task once, got {printable(str(error))}; name the group, or its tasks"
        ) from error
    return evaluator, manager, loaded


def scores_of(found: Mapping[str, Any]) -> dict[str, Score]:
    """Scores of what lm-eval returns: `lm-eval/<task>/<metric>`, with the filter where it is not `none`.

    Of a group they have as many items as the tasks in it.
    """
    scores: dict[str, Score] = {}
    for task, numbers in found["results"].items():
        count = _items(found, task)
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            name = f"lm-eval/{task}/{metric}{'' if kind == 'none' else f', {kind}'}"
            known = isinstance(error, int | float)
            scores[name] = Score(value=float(value), error=float(error) if known else math.inf, count=count)
    return scores


def _items(found: Mapping[str, Any], name: str) -> int:
    """Items that were asked of a task, or of all tasks of a group."""
    if inner := found.get("group_subtasks", {}).get(name):
        return sum(_items(found, task) for task in inner)
    return int(found.get("n-samples", {}).get(name, {}).get("effective", 0))


def model_of(network: Network, tokenizer: Tokenizer) -> Any:
    """A trained model as lm-eval's `TemplateLM`, whose tokenization of prompt and continuation it takes over."""
    api = importlib.import_module("lm_eval.api.model")
    encoder, end, most = encoding(tokenizer), tokenizer.end_of_text, network.config.max_positions

    class Model(api.TemplateLM):
        """The four requests of lm-eval."""

        eot_token_id = end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **further: Any) -> list[int]:
            return encoder.encode_ordinary(string)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **further: Any
        ) -> list[tuple[float, bool]]:
            # A context of nothing is the end of a text, which `rows` puts in front of every prompt.
            read = [
                row
                for place, (_, context, text) in enumerate(requests)
                for row in rows([] if context == [end] else context, text, place=place, first=end, most=most)
            ]
            return [(-nats, likeliest) for nats, likeliest in scored(network, read, len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any], **further: Any) -> list[float]:
            texts = [([], encoder.encode_ordinary(request.args[0])) for request in requests]
            return [value for value, _ in self._loglikelihood_tokens([("", *pair) for pair in texts])]

        def generate_until(self, requests: Sequence[Any], **further: Any) -> list[str]:
            added: list[str] = []
            start = 0
            while start < len(requests):
                settings = requests[start].args[1]
                part = [request.args for request in requests[start : start + PROMPTS]]
                alike = next((at for at, (_, other) in enumerate(part) if other != settings), len(part))
                prompts = [encoder.encode_ordinary(prompt) or [end] for prompt, _ in part[:alike]]
                added += continued(network, tokenizer, prompts, settings, Key(0).fold("lm-eval", start))
                start += alike
            return added

    return Model()


def continued(
    network: Network, tokenizer: Tokenizer, prompts: Sequence[list[int]], settings: Mapping[str, Any], key: Key
) -> list[str]:
    """Continuations as a task's `generation_kwargs` say. Of a prompt that leaves no room the end is kept.

    Raises:  InputError for a setting that has no meaning here.
    """
    normalised = importlib.import_module("lm_eval.models.utils").normalize_gen_kwargs(dict(settings), MAX_TOKENS)
    known = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
    if unknown := sorted(normalised.keys() - set(known)):
        raise InputError(
            f"--lm-eval: expected generation_kwargs of {', '.join(known)}, got {', '.join(unknown)}; take it out of "
            "the task's YAML file"
        )
    num_tokens = min(int(normalised["max_gen_toks"]), network.config.max_positions)
    room = network.config.max_positions + 1 - num_tokens
    sampled = bool(normalised["do_sample"])
    return generate.continued(
        network,
        tokenizer,
        [prompt[-room:] for prompt in prompts],
        num_tokens=num_tokens,
        sampling=Sampling(
            temperature=float(normalised.get("temperature", 1.0)) if sampled else 0.0,
            top_k=normalised.get("top_k") or None,
            top_p=float(normalised.get("top_p", 1.0)),
        ),
        key=key,
        stops=[text for text in normalised["until"] if text],
        cached=network.env.kind.cache is not None,
    )
