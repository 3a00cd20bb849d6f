"""TOML text: reading a file, which line a key is on, single values, and how values are shown in messages."""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import attrs
import tomli
import tomli_w

from nmoe.config.fields import KeyPath, flat
from nmoe.errors import InputError, printable

LONGEST = 80
"""Characters of a value that a message shows at most."""

ALIKE = 0.7
"""Likeness of a word to one that is suggested, from 0 to 1: "gpu" and "cpu" have 0.67, "sede" and "seed" 0.75."""

KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "model": ("the config of a training", "train it with `nmoe run {}`"),
        "input": ("a data source", "prepare it with `nmoe data prep {} OUT`"),
        "sources": ("a data mixture", "prepare it with `nmoe data prep {}`"),
    }
)
"""By a table that files of one kind have and others have not: what such a file is, and what it is for."""

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("gpu", "gpus", "nvidia"), "cuda"),
        **dict.fromkeys(("bfloat16", "half", "fp16", "amp"), "bf16"),
        **dict.fromkeys(("float32", "fp32_", "tf32"), "fp32"),
        **dict.fromkeys(("val", "valid", "dev", "eval"), "validation"),
        **dict.fromkeys(("lr", "learning_rate", "max_lr"), "optim.dense.lr"),
        **dict.fromkeys(("min_lr", "min_lr_ratio", "final_lr"), "schedule.floor"),
        **dict.fromkeys(("warmup_steps", "warmup_ratio", "warmup_iters", "lr_warmup"), "schedule.warmup"),
        **dict.fromkeys(("grad_clip", "max_grad_norm", "clip", "gradient_clipping"), "optim.clip_norm"),
        **dict.fromkeys(("wd", "weight_decay"), "optim.weight_decay"),
        **dict.fromkeys(("batch", "global_batch_size", "gbs", "train_batch_size"), "train.batch_size"),
        **dict.fromkeys(("micro_batch_size", "mbs", "device_batch_size"), "train.microbatch_size"),
        **dict.fromkeys(("seq_len", "seq_length", "seqlen", "context_length", "block_size"), "train.sequence_length"),
        **dict.fromkeys(("max_seq_len", "max_position_embeddings"), "model.max_positions"),
        **dict.fromkeys(("max_steps", "num_steps", "iters", "max_iters", "train_iters"), "train.steps"),
        **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), "train.recompute"),
        **dict.fromkeys(("eval_every", "val_every", "eval_interval", "eval_steps", "val_interval"), "validation.every"),
        **dict.fromkeys(("save_every", "save_interval", "save_steps", "ckpt_every"), "checkpoint.every"),
        **dict.fromkeys(("log_interval", "log_every", "logging_steps"), "log.every"),
        **dict.fromkeys(("n_layer", "n_layers", "depth", "num_hidden_layers"), "model.num_layers"),
        **dict.fromkeys(("d_model", "n_embd", "dim", "embed_dim"), "model.hidden_size"),
        **dict.fromkeys(("n_head", "n_heads", "num_attention_heads"), "model.attention.num_heads"),
        **dict.fromkeys(("d_ff", "ffn_dim", "ffn_hidden_size"), "model.intermediate_size"),
        **dict.fromkeys(("n_experts", "n_routed_experts", "num_local_experts"), "model.moe.num_experts"),
        **dict.fromkeys(("topk", "num_experts_per_tok", "moe_top_k"), "model.moe.top_k"),
        **dict.fromkeys(("dtype", "torch_dtype", "mixed_precision"), "precision.compute"),
        **dict.fromkeys(("world_size", "nproc", "num_gpus", "ngpus"), "parallel.ranks"),
        **dict.fromkeys(("ep", "ep_size", "expert_parallel"), "parallel.experts"),
        **dict.fromkeys(("out_dir", "output_dir", "save_dir"), "run.root"),
        **dict.fromkeys(("wandb_name", "run_name", "experiment"), "run.name"),
        **dict.fromkeys(("init_from", "pretrained", "load"), "train.warm_start"),
    }
)
"""What other trainers call a key or a value of ours, for suggestions alone: nothing is read by these names."""

HINTS = (
    (r"=\s*(True|False)\b", "TOML uses true/false"),
    (r"=\s*[+-]?\.\d", "write a digit before the point"),
    (r"=\s*[+-]?\d+(,\d{3})+\b", "write the number without commas, or with _ in their place"),
    (r"=\s*[A-Za-z/~.$]", "put text in quotes"),
)
"""What to say of a line that is no TOML, by what it looks like."""


@attrs.frozen(kw_only=True)
class Document:
    """A TOML file: its tables, and the line of each key and table header."""

    path: Path
    tables: dict[str, Any]
    lines: dict[KeyPath, int]

    def fault(self, key: KeyPath, text: str) -> str:
        """What is wrong with a key, behind file and line of it or of the nearest table around it that is written."""
        written = next((key[:size] for size in range(len(key), 0, -1) if key[:size] in self.lines), None)
        line = "" if written is None else f":{self.lines[written]}"
        return f"{printable(str(self.path))}{line}: {dotted(key)}: {text}"


def closest(word: str, possibilities: Sequence[str]) -> str | None:
    """The possibility that a word probably means: by what other trainers call it, or mistyped; None below `ALIKE`, and
    for a word longer than a message shows."""
    if len(word) > LONGEST:  # comparing takes time in proportion to its length, 2 s for 1.5 MB
        return None
    meant = SYNONYMS.get(word.lower().replace("-", "_"))
    if meant in possibilities:
        return meant
    return next(iter(difflib.get_close_matches(word, possibilities, n=1, cutoff=ALIKE)), None)


def shown(value: Any) -> str:
    """A value as a message shows it: a TOML literal on one line, long ones cut, tables and arrays by name."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array"
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        value = value[: LONGEST + 1]
    text = printable(tomli_w.dumps({"value": value}).removeprefix("value = ").strip())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def dotted(path: KeyPath) -> str:
    """A path as TOML writes it, names that are not bare keys in quotes."""
    return ".".join(name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else shown(name) for name in path)


def literal(text: str) -> Any:
    """The value of a TOML literal; text that is none is a string, for the strict conversion to judge.

    What is followed by a comment or a second statement is none: it does not parse within brackets.
    """
    try:
        tomli.loads(f"value = [{text}]")
        return tomli.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def read(path: Path) -> Document:
    """A TOML file.

    Raises:  InputError when it is missing, unreadable, not UTF-8 or not TOML.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        near = closest(path.stem, [other.stem for other in path.parent.glob("*.toml")])
        hint = f"did you mean {path.with_name(f'{near}.toml')}?" if near else "check the path"
        raise InputError(f"{path}: expected an existing file, got none; {hint}") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a TOML file, got a directory; name a file in it") from error
    except OSError as error:
        raise InputError(
            f"{path}: expected a readable file, got {error.strerror}; check the path and its permissions"
        ) from error
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise InputError(
            f"{path}:{line}: expected text in UTF-8, got the byte 0x{byte:02x}; save the file as UTF-8"
        ) from error
    return Document(path=path, tables=_parse(text, path), lines=lines(text))


def read_kind(path: Path, own: str) -> Document:
    """A TOML file of the kind that has the table `own`, one of `KINDS`.

    Raises:  InputError as `read`, and when the file is of another kind; one that extends another is taken for its own.
    """
    document = read(path)
    other = next((key for key in KINDS if key in document.tables), own)
    if other != own and not document.tables.keys() & {own, "extends"}:
        name = printable(str(path))
        raise InputError(f"{name}: expected {KINDS[own][0]}, got {KINDS[other][0]}; {KINDS[other][1].format(name)}")
    return document


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        line = text.replace("\r\n", "\n").split("\n")[error.lineno - 1]
        hint = next((hint for pattern, hint in HINTS if re.search(pattern, line)), f"fix column {error.colno}")
        raise InputError(f"{path}:{error.lineno}: expected TOML, got {_lowered(error.msg)}; {hint}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected TOML that can be read, got {_lowered(str(error))}; shorten it") from error


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def lines(text: str) -> dict[KeyPath, int]:
    """The line each key and table of a TOML text is first named on, counted from 1; all keys of one statement are on
    the line it begins on."""
    places: dict[KeyPath, int] = {}
    header: KeyPath = ()
    for number, statement in _statements(text.replace("\r\n", "\n")):
        parsed = tomli.loads(statement)
        is_header = statement.lstrip().startswith("[")
        if is_header:
            header = _header(parsed)
        for path in (header,) if is_header else ((*header, *path) for path, _ in flat(parsed)):
            while path and path not in places:
                places[path] = number
                path = path[:-1]
    return places


_TOKEN = re.compile(
    r""""{3}(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}\n]""", re.DOTALL
)
"""What decides where a statement of TOML ends: brackets, line ends, and strings and comments around others of them."""


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The statements of a TOML text, each with the line it begins on: a line end outside of brackets ends one."""
    depth, begin, number = 0, 0, 1
    for token in _TOKEN.finditer(f"{text}\n"):
        depth += (token[0] in ("[", "{")) - (token[0] in ("]", "}"))
        if token[0] == "\n" and not depth:
            statement = text[begin : token.start()]
            yield number, statement
            begin, number = token.end(), number + statement.count("\n") + 1


def _header(parsed: dict[str, Any]) -> KeyPath:
    """Path of the one table in the parsed text of `[a.b]` or `[[a.b]]`."""
    path: list[str] = []
    inner: Any = parsed
    while inner:
        if isinstance(inner, list):
            inner = cast("list[Any]", inner)[0]
        else:
            name, inner = next(iter(cast("dict[str, Any]", inner).items()))
            path.append(name)
    return tuple(path)
