"""A tokenizer's chat template: messages turned into text, in the same words whatever day it is."""

from __future__ import annotations

import re
from datetime import date, datetime

from jinja2.exceptions import TemplateError

from common.base.errors import UserError, first_line

# Llama 3's own date for when there is no clock; templates that name none of their own get it too.
DATE = "26 Jul 2024"
# ShareGPT's names of who speaks.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_OWN_DATE = re.compile(r"""date_string\s*=\s*["'](\d{1,2} [A-Z][a-z]{2} \d{4})["']""")


def document(value) -> str | list[dict]:
    """What a data set's row holds as a text, or as messages with the strings `role` and `content`.

    None and empty lists are blank texts. ShareGPT's messages of `from` and `value` are renamed, and
    of a content that is a list of parts the text parts are joined.

    Raises:
        ValueError: it is something else; says what.
    """
    if isinstance(value, str) or value is None or value == []:
        return value or ""
    if not isinstance(value, list):
        raise ValueError(f"of type {type(value).__name__}")
    return [_message(item) for item in value]


def _message(item) -> dict:
    if not isinstance(item, dict):
        raise ValueError(f"a list of {type(item).__name__}")
    role, content, speaker = map(item.get, ("role", "content", "from"))
    if role is None and isinstance(speaker, str) and isinstance(item.get("value"), str):
        if speaker not in _SPEAKERS:
            raise ValueError(f"a message from {speaker!r} (known are {', '.join(_SPEAKERS)})")
        return {"role": _SPEAKERS[speaker], "content": item["value"]}
    if isinstance(content, list):
        texts = [
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        content = "".join(texts) if texts else content
    if isinstance(role, str) and isinstance(content, str):
        return {**item, "content": content}
    forms = ", ".join(f"{name}: {type(part).__name__}" for name, part in item.items())
    raise ValueError(f"a list with a message of the form {{{forms}}}")


def template_date(tokenizer) -> str | None:
    """The date (ISO 8601) that conversations are rendered with; None if the template writes none.

    It is the template's own for when it has no clock.
    """
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    if "strftime_now" not in template and "date_string" not in template:
        return None
    own = _OWN_DATE.search(template)
    return datetime.strptime(own[1] if own else DATE, "%d %b %Y").date().isoformat()


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation as the model sees it, special tokens written out: BOS too, if the template
    writes it.

    Today's date would make other calibration tokens and other prompts of the same data every day.

    Raises:
        UserError: the template refuses the messages, as some do for roles that do not alternate.
    """
    day = template_date(tokenizer)
    # What is passed hides transformers' own function of this name.
    clock = {"strftime_now": date.fromisoformat(day).strftime} if day else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **clock
        )
    except TemplateError as error:
        raise UserError(
            f"the model's chat template refuses a conversation: {first_line(error)}"
        ) from None
