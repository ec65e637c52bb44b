"""Export: a checkpoint's weights as a Hugging Face folder that plain transformers and plain vLLM load."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from deltal.config import ChatConfig
from deltal.config.lora import Lora
from deltal.data.chat import Chat
from deltal.data.tokenizer import FILES, class_that_disagrees, copy_tokenizer
from deltal.errors import UserError, one_line
from deltal.learner.checkpoint import Checkpoints
from deltal.learner.lora import adapt, fold, write_adapter
from deltal.learner.model import load, prepare

TAGS = "tags: [reinforcement-learning, rlvr, deltal]"
"""The line of a model card by which a later export knows its own."""
WRITTEN = ", in chat_template.jinja"
OTHER_WAY = ("adapter_config.json", "config.json", "generation_config.json", "model.safetensors.index.json")
"""What an export with or without `adapter`, or of another size, may have left."""


def export(
    checkpoints: str, target: str, *, config: Any, version: int | None = None, facts: dict[str, Any] | None = None,
    adapter: bool = False,
) -> int:  # fmt: skip
    """Write safetensors, tokenizer and a model card of `version` (None: the newest) into the folder `target`.

    Adapters are merged into the weights; `adapter` writes them alone, as a peft folder on top of the start model.
    Returns the version. Raises UserError when there is no such checkpoint or `target` holds something else.
    """
    store = Checkpoints(checkpoints, keep=1_000_000)
    versions = store.versions()
    if not versions or (version is not None and version not in versions):
        have = ", ".join(str(v) for v in versions) or "none"
        raise UserError(
            f"there is no checkpoint {'' if version is None else f'{version} '}in {checkpoints}; there are: {have}"
        )
    chosen = versions[-1] if version is None else version
    folder = Path(target).resolve()
    if folder.exists() and not _may_be_replaced(folder):
        raise UserError(f"{target} exists and is no export of deltal; choose another")
    if folder == Path.cwd():
        raise UserError("the folder you stand in cannot be replaced; name another")
    lora = config.learner.lora
    if adapter and not isinstance(lora, Lora):
        raise UserError("this run trained all weights and has no adapter: export it without --adapter")
    base = prepare(config.model)
    started_from = {Path(base).resolve(), Path(getattr(config.model, "path", base)).expanduser().resolve()}
    if folder in started_from:
        raise UserError(f"{target} is the model this run began from, which it still needs; choose another")
    model: Any = load(base)
    if isinstance(lora, Lora):
        adapt(model, lora, seed=config.run.seed)
    store.load_weights(chosen, model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made: {one_line(error)}") from error
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        if adapter:
            write_adapter(model, temporary, lora=lora, base=base)
        else:
            fold(model)
            model.config.use_cache = True
            model.save_pretrained(temporary)
        copy_tokenizer(base, temporary)
        told = write_chat(config.chat, temporary) | (facts or {})
        (temporary / "README.md").write_text(model_card(config, chosen, told))
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors' are the owner's alone
        _put(temporary, folder)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return chosen


def write_chat(settings: ChatConfig, folder: Path) -> dict[str, str]:
    """Let the folder's tokenizer render and end prompts as in training; returns what the card tells of it.

    Its files stay as they are where they do so already. Elsewhere chat_template.jinja, which transformers and vLLM
    prefer to tokenizer_config.json, gets the run's template, and generation_config.json the tokens that ended a
    response. Raises ModelError when the folder holds no tokenizer.
    """
    chat = Chat(str(folder), settings)
    template = chat.as_template()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ends = generation.get("eos_token_id")
    if not set(chat.stop_token_ids) <= set(ends if isinstance(ends, list) else [ends]):
        generation["eos_token_id"] = list(chat.stop_token_ids)
        file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    names = {"model": "the start model's own", "chatml": "chatml", "plain": "plain, messages as they are"}
    told = {"chat template": names.get(settings.template, "the run's own") + ("" if template is None else WRITTEN)}
    for name, text in (("system prompt", settings.system_prompt), ("prefill", settings.prefill)):
        if text:
            told[name] = f"`{json.dumps(text, ensure_ascii=False)}`".replace("|", "\\|")
    if settings.prefill:
        told["prefill"] += ", to be added after the template's generation prompt"
    other = class_that_disagrees(folder)
    if other is not None:
        told["tokenizer"] = f"load it with PreTrainedTokenizerFast: AutoTokenizer makes it a {other}, with other tokens"
    return told


def _put(new: Path, folder: Path) -> None:
    """Move `new` to where an earlier export `folder` may be; what others put into that one stays."""
    if not folder.exists():
        new.rename(folder)
        return
    before = new.with_name(f"{new.name}.before")
    folder.rename(before)
    try:
        new.rename(folder)
    except OSError:
        before.rename(folder)
        raise
    for path in before.iterdir():
        is_ours = path.suffix == ".safetensors" or path.name in OTHER_WAY or any(map(path.match, FILES))
        if not (folder / path.name).exists() and not is_ours:
            path.rename(folder / path.name)
    shutil.rmtree(before, ignore_errors=True)


def _may_be_replaced(folder: Path) -> bool:
    """An empty folder or an earlier export; not, for instance, a model that somebody downloaded."""
    if not folder.is_dir():
        return False
    card = folder / "README.md"
    return not any(folder.iterdir()) or (card.is_file() and TAGS in card.read_text(errors="replace").splitlines())


def model_card(config: Any, version: int, facts: dict[str, Any]) -> str:
    """The card: what was trained on what, with which aggregation, and how it evaluated."""
    aggregation = config.algorithm.aggregation
    # The method's own numbers, and of the rest what is not as usual.
    shown = aggregation.model_dump(include={"kind", "alpha"}) | aggregation.model_dump(exclude_defaults=True)
    method = ", ".join(f"{key} {value}" for key, value in shown.items())
    start = config.run.forked_from or getattr(config.model, "path", None) or getattr(config.model, "package", "random")
    lines = [
        "---",
        "library_name: transformers",
        TAGS,
        "---",
        f"# {config.run.name or 'deltal run'}, policy version {version}",
        "",
        "Trained by reinforcement learning with verifiable rewards with deltal.",
        "",
        "| | |",
        "|---|---|",
        f"| start model | {start} |",
        f"| data | {getattr(config.data, 'name', None) or getattr(config.data, 'path', '')} |",
        f"| aggregation | {method} |",
        f"| advantage | {config.algorithm.advantage} |",
        f"| learning rate | {config.learner.learning_rate} |",
        f"| responses a prompt | {config.rollout.responses_per_prompt} |",
        f"| response limit (tokens) | {config.rollout.max_response_tokens} |",
        f"| sampling temperature | {config.rollout.temperature} |",
    ]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"
