"""Made-up conversations, a file of them, and a tokenizer whose template writes the date."""

from __future__ import annotations

import json
import random
from datetime import datetime

import pytest
from conftest import WORDS, tiny_tokenizer

CONVERSATION = [
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "runs high"},
]
# The form of Llama 3's: BOS, a system message with the date, every message closed.
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = 'OWN DATE' %}{% endif %}{% endif %}system: {{ date_string }}<|end|>"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def llama_like():
    """A tiny tokenizer that puts BOS before every text, ends messages with EOS, writes the date."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    tokenizer.chat_template = DATED.replace("OWN DATE", "26 Jul 2024")
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 0
    return tokenizer


@pytest.fixture
def on_day(monkeypatch):
    """Set the clock that transformers gives to templates."""
    from transformers.utils import chat_template_utils

    def set_clock(year: int, month: int, day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, month, day, 12, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


def chat_file(folder, conversations) -> str:
    file = folder / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    return str(file)


def conversations(count: int) -> list[list[dict]]:
    rng = random.Random(7)
    return [
        [
            {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))}
            for role in ("user", "assistant")
        ]
        for _ in range(count)
    ]
