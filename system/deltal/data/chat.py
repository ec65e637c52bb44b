"""Messages to prompt tokens and response tokens to text."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltal.config import ChatConfig
from deltal.data.tokenizer import folder_of, open_tokenizer, switch_off_extras
from deltal.errors import ConfigError, DataError, ModelError, one_line
from deltal.types import Message, Prompt

CHATML_END = "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What `chatml` does, as a template."""
PLAIN = "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ message['content'] }}{% endfor %}"
"""What `plain` does, but for the begin token."""
TALKS = (("user",), ("system", "user"), ("user", "assistant", "user"))
"""Conversations on which two templates are compared."""


def check_template(settings: ChatConfig) -> None:
    """Whether a Jinja template of the settings can be read. Raises ConfigError, in one line, when it cannot."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if settings.template in ("model", "plain", "chatml"):
        return
    if "{" not in settings.template:
        raise ConfigError(
            f"chat.template = {settings.template!r} is neither model, chatml, plain nor a Jinja template over messages"
        )
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(settings.template)
    except TemplateSyntaxError as error:
        if "unknown tag" in str(error):
            return  # transformers has tags of its own
        raise ConfigError(f"chat.template, line {error.lineno}: {one_line(error)}") from error


def no_template(model: str) -> ConfigError:
    """What is said of a model without a chat template where the settings want the model's own."""
    return ConfigError(
        f"chat.template = 'model', but {model} has no chat template: set chat.template=chatml, or plain, or a Jinja "
        "template"
    )


class Chat:
    """One tokenizer with the chat settings of a run.

    Special-token strings inside a prompt's messages stay plain text: they are tokenized apart, with the tokenizer's
    special tokens switched off. The template, the system prompt and the prefill are the user's own and may use them.
    """

    def __init__(self, tokenizer_folder: str, settings: ChatConfig) -> None:
        """Loads the tokenizer of a folder or hub name. Raises ModelError when there is none that can be used, and
        ConfigError when it lacks the chat template that the settings ask for.
        """
        self._tokenizer: Any = open_tokenizer(tokenizer_folder)
        self._folder = folder_of(tokenizer_folder)
        self._settings = settings
        self._plain = _without_special_tokens(self._tokenizer)
        if settings.template == "model" and self._own_template() is None:
            raise no_template(tokenizer_folder)
        self._special = tuple(
            token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special and token.content
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids the tokenizer knows, added ones included."""
        return len(self._tokenizer)

    @functools.cached_property  # asked for with every response, and get_vocab() takes 50 ms
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response, ascending: the tokenizer's eos, those of generation_config.json, chatml's end."""
        stops = {self._tokenizer.eos_token_id} | _generation_eos(self._folder)
        if self._settings.template == "chatml":
            stops.add(self._tokenizer.get_vocab().get(CHATML_END))
        return tuple(sorted(stop for stop in stops if stop is not None))

    def encode(self, prompt: Prompt) -> NDArray[np.int32]:
        """Prompt tokens, int32[P]: system prompt and messages through the template, generation prompt, prefill.

        Raises DataError, in one line, when the template does not work on the prompt.
        """
        text, hidden = self._hide_special(prompt)
        system = [Message(role="system", content=self._settings.system_prompt)] if self._settings.system_prompt else []
        rendered = self._render([*system, *text], prompt.id) + self._settings.prefill
        return np.asarray(self._start_tokens() + self._tokens(rendered, hidden), dtype=np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens` (int[L]) without special tokens. Bytes that are no UTF-8 become the replacement sign."""
        ids = [int(token) for token in tokens]
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def as_template(self) -> str | None:
        """The Jinja template by which plain transformers renders this run's prompts, all but the prefill; None when the
        model's own does already.
        """
        own = self._own_template()
        named = {"model": own, "chatml": CHATML, "plain": PLAIN}
        text = named.get(self._settings.template, self._settings.template)
        if text is None:
            return None
        if self._start_tokens():
            text = "{{ bos_token }}" + text
        if self._settings.system_prompt:
            # Twice is once: a conversation that brings its own, or a run that begins from the export, changes nothing.
            said = json.dumps(self._settings.system_prompt, ensure_ascii=False)
            text = (
                "{% if messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': "
                + said + "}] + messages %}{% endif %}" + text
            )  # fmt: skip
        if own is not None and all(self._said(own, talk) == self._said(text, talk) for talk in TALKS):
            return None
        return text

    def _own_template(self) -> str | None:
        own = self._tokenizer.chat_template
        return own.get("default") if isinstance(own, dict) else own

    def _said(self, template: str, roles: tuple[str, ...]) -> tuple[str, ...]:
        """What a template makes of a conversation, with and without generation prompt; or that it refuses it."""
        talk = [{"role": role, "content": f"content {place}"} for place, role in enumerate(roles)]
        try:
            return tuple(
                self._tokenizer.apply_chat_template(
                    talk, chat_template=template, add_generation_prompt=wanted, tokenize=False
                )
                for wanted in (True, False)
            )
        except Exception as error:  # jinja2's errors, and whatever an expression inside the template raises
            return (type(error).__name__,)

    def _render(self, messages: list[Message], prompt_id: str) -> str:
        template = self._settings.template
        if template == "plain":
            return "\n".join(message.content for message in messages)
        if template == "chatml":
            turns = (f"<|im_start|>{message.role}\n{message.content}{CHATML_END}\n" for message in messages)
            return "".join(turns) + "<|im_start|>assistant\n"
        try:
            rendered = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=None if template == "model" else template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # jinja2's errors, and whatever an expression inside the template raises
            raise DataError(f"chat template fails on prompt {prompt_id!r}: {one_line(error)}") from error
        return str(rendered)

    def _start_tokens(self) -> list[int]:
        """The begin token of a plain prompt, where the tokenizer puts one; chat templates write their own."""
        if self._settings.template != "plain" or self._tokenizer.bos_token_id is None:
            return []
        ids: list[int] = self._tokenizer("", add_special_tokens=True)["input_ids"]
        return ids[:1] if ids[:1] == [self._tokenizer.bos_token_id] else []

    def _hide_special(self, prompt: Prompt) -> tuple[list[Message], dict[str, str]]:
        """Messages with each special-token string replaced by a sign that occurs nowhere, and sign -> string."""
        contents = "".join(message.content for message in prompt.messages)
        found = sorted((token for token in self._special if token in contents), key=len, reverse=True)
        trusted = contents + self._settings.template + (self._settings.system_prompt or "") + self._settings.prefill
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in trusted)
        hidden = {next(free): token for token in found}
        messages = []
        for message in prompt.messages:
            content = message.content
            for sign, token in hidden.items():
                content = content.replace(token, sign)
            messages.append(Message(role=message.role, content=content))
        return messages, hidden

    def _tokens(self, text: str, hidden: dict[str, str]) -> list[int]:
        ids: list[int] = []
        start = 0
        for place, sign in enumerate(text):
            if sign in hidden:
                ids += self._trusted(text[start:place]) + self._plain.encode(hidden[sign], add_special_tokens=False).ids
                start = place + 1
        return ids + self._trusted(text[start:])

    def _trusted(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids


def _without_special_tokens(tokenizer: Any) -> Any:
    """A copy of the tokenizer for which special-token strings are ordinary text."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.encode_special_tokens = True
    switch_off_extras(copy)
    return copy


def _generation_eos(folder: Path) -> set[int | None]:
    """eos_token_id of generation_config.json: one, several, or none."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return set()
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} is no JSON object: {one_line(error)}") from error
    ends = eos if isinstance(eos, list) else [eos]
    if not all(end is None or (isinstance(end, int) and not isinstance(end, bool)) for end in ends):
        raise ModelError(f"{file}: eos_token_id = {eos!r} is neither a token's number nor a list of them")
    return set(ends)
