"""A tokenizer's chat template: messages turned into text, in the same words whatever day it is."""

from __future__ import annotations

import re
from datetime import date, datetime

from jinja2.exceptions import TemplateError

from common.errors import UserError

# Llama 3's own date for when there is no clock; templates that name none of their own get it too.
DATE = "26 Jul 2024"
_OWN_DATE = re.compile(r"""date_string\s*=\s*["'](\d{1,2} [A-Z][a-z]{2} \d{4})["']""")


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
        return tokenizer.apply_chat_template(messages, tokenize=False,
                                             add_generation_prompt=add_generation_prompt, **clock)
    except TemplateError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"the model's chat template refuses a conversation: {reason}") from None
