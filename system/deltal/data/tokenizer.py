"""A model's tokenizer, opened as its own files say; and those files, copied as they are.

transformers' `AutoTokenizer` builds the class that tokenizer_config.json names around the vocabulary of tokenizer.json.
Where the named class is not the one the file was made with (`LlamaTokenizerFast` over a byte-level file, as many
published models have it), spaces vanish without a word. Here tokenizer.json is read as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deltal.errors import ModelError, one_line

FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*",
    "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*.model", "tokenization_*.py",
    "generation_config.json",
)  # fmt: skip
"""What belongs to a tokenizer, as patterns, with the settings of generation, which name the ends of a response."""
SAMPLE = "The answer is:\n\n\t46 + 7 = 53;  naïve, 你好, don't </b>"
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def folder_of(source: str, *, is_local: bool = False) -> Path:
    """The folder with the tokenizer of a model folder or hub name; `is_local`: only what is on this machine already.

    Raises ModelError when a hub name cannot be fetched.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(source, allow_patterns=[*FILES, "config.json"], local_files_only=is_local)
    except Exception as error:  # its errors of network, name and login have no common base
        raise ModelError(f"no tokenizer can be loaded from {source!r}: {one_line(error, line=0)}") from error
    return Path(found)


def open_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub name, with its chat template and the names of its special tokens.

    Raises ModelError when there is none, when it is no fast one, or when a sample shows that it loses text.
    """
    from transformers import PreTrainedTokenizerFast

    folder = folder_of(source)
    file = folder / "tokenizer.json"
    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder) if file.is_file() else _by_class(folder)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError … for one and the same cause
        raise ModelError(f"no tokenizer can be loaded from {source!r}: {one_line(error)}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"{type(tokenizer).__name__} is no fast tokenizer: convert it to tokenizer.json first")
    switch_off_extras(tokenizer.backend_tokenizer)
    if file.is_file():
        _name_special_tokens(tokenizer, folder)
        _compare(tokenizer, file)
    else:
        _check_spaces(tokenizer, source)
    return tokenizer


def class_that_disagrees(folder: Path) -> str | None:
    """The class that `AutoTokenizer` makes of a folder, if it does to a sample what tokenizer.json does not say."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        by_class = _by_class(folder)
        _compare(by_class, folder / "tokenizer.json")
    except ModelError:
        return type(by_class).__name__
    except Exception as error:  # transformers cannot make it at all
        return f"{type(error).__name__}"
    return None


def switch_off_extras(backend: Any) -> None:
    """Some files have padding, truncation or the dropout of the tokenizer's own training switched on: not for us."""
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def copy_tokenizer(source: str, target: Path) -> None:
    """Copy the tokenizer's files of a folder or hub name into `target`, byte for byte, generation settings included.

    Raises ModelError when there are none.
    """
    folder = folder_of(source)
    files = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
    if not any(file.name != "generation_config.json" for file in files):
        raise ModelError(f"{source} holds no tokenizer")
    for file in files:
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def byte_tokenizer() -> Any:
    """That of random models: a token a byte, one that begins a turn, and token 256, which ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


def _by_class(folder: Path) -> Any:
    """As transformers builds it: the class that the folder's settings name."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _name_special_tokens(tokenizer: Any, folder: Path) -> None:
    """Names that stand in no file but in the class that the settings name, such as GPT-2's eos."""
    if tokenizer.eos_token is not None:
        return  # Files that name this one name all there are; and asking the class takes seconds.
    try:
        by_class = _by_class(folder)
    except Exception:  # an unknown class names nothing
        return
    known = tokenizer.get_vocab()
    for name in NAMED:
        token = getattr(by_class, name, None)
        if token is not None and token in known and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)


def _compare(tokenizer: Any, file: Path) -> None:
    """Whether `tokenizer` does to a sample what tokenizer.json says. Raises ModelError when it does not."""
    from tokenizers import Tokenizer

    said = Tokenizer.from_file(str(file))
    switch_off_extras(said)
    ids = said.encode(SAMPLE, add_special_tokens=False).ids
    ours = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if ours != ids or text != said.decode(ids):
        raise ModelError(
            f"{file} and the tokenizer transformers makes of it disagree on {SAMPLE!r}: {ids} and {ours}; prompts "
            "would have other tokens than the model was trained on"
        )
    for id, token in getattr(tokenizer, "init_kwargs", {}).get("added_tokens_decoder", {}).items():
        # One that is not in tokenizer.json gets the next free id, which need not be the one it had in training.
        if said.token_to_id(str(token)) is None and tokenizer.convert_tokens_to_ids(str(token)) != int(id):
            raise ModelError(
                f"{file.with_name('tokenizer_config.json')} gives {str(token)!r} the id {id}, but tokenizer.json lacks "
                f"it and ends at {said.get_vocab_size() - 1}: add it there"
            )


def _check_spaces(tokenizer: Any, source: str) -> None:
    """Without tokenizer.json there is nothing to compare with but the text itself. Raises ModelError if words merge."""
    words = ["the", "answer", "is", "46"]
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.lower().split() != words:
        raise ModelError(
            f"the tokenizer of {source!r} turns {' '.join(words)!r} into {back!r}: its files do not fit the class "
            f"{type(tokenizer).__name__}; convert it to tokenizer.json first"
        )
