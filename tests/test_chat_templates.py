"""Chat templates: the same text on any day, and what they refuse or leave out."""

from __future__ import annotations

import pytest
from conftest import build_tiny, tiny_tokenizer
from stub_chats import CONVERSATION, DATED, chat_file, conversations, llama_like

from common.base.errors import UserError
from common.tasks import squad_v2
from common.tasks.harness import run_task
from common.tasks.language_model import HarnessModel
from common.text import chat
from common.text.windows import calibration_windows


def test_text_and_prompts_are_the_same_on_another_day(on_day, tmp_path):
    tokenizer = llama_like()
    harness = HarnessModel(build_tiny("llama", tied=True), tokenizer)
    data, seen = chat_file(tmp_path, conversations(60)), []
    for day in ((2026, 11, 24), (2031, 12, 31)):
        on_day(*day)
        # The clock is the one that templates see.
        assert str(day[0]) in tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
        windows = calibration_windows(data, tokenizer, 4, 50, 0)
        assert windows.describe()["template_date"] == "2024-07-26"
        assert "26 Jul 2024" in tokenizer.decode(windows.tokens.flatten())
        seen.append((windows.fingerprint, harness.apply_chat_template(CONVERSATION[:1])))
    assert seen[0] == seen[1]
    expected = "<|start|>system: 26 Jul 2024<|end|>user: the river<|end|>assistant: "
    assert seen[0][1] == expected


@pytest.mark.parametrize(
    "template, date, words",
    [
        (DATED.replace("OWN DATE", "01 Feb 2025"), "2025-02-01", "01 Feb 2025"),
        ("{{ strftime_now('%Y-%m-%d %H') }}", "2024-07-26", "2024-07-26 00"),
        (
            "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
            "{{ date_string }}",
            "2024-07-26",
            "26 Jul 2024",
        ),
        ("{{ messages[0]['content'] }}", None, "the river"),
    ],
)
def test_the_date_is_the_templates_own(template, date, words):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert chat.template_date(tokenizer) == date
    assert words in chat.render(tokenizer, CONVERSATION)


def test_plain_text_has_no_template_date(calibration_text):
    assert calibration_windows(str(calibration_text), llama_like(), 4, 50, 0).template_date is None


def test_results_say_which_date_the_prompts_have(on_day):
    from common.text.data import Rows, demo_rows

    tokenizer = llama_like()
    model = build_tiny("llama", tied=True).float().eval()
    model.generation_config.eos_token_id = 1
    on_day(2031, 12, 31)
    rows = Rows(demo_rows("squad").rows[:2], "demo")
    summary, _ = run_task(squad_v2.TASK, model, tokenizer, rows, demo=False)
    assert summary["template_date"] == "2024-07-26"
    assert summary["first_prompt"].startswith("<|start|>system: 26 Jul 2024")
    assert "2031" not in summary["first_prompt"]


def test_a_refused_conversation_is_one_line():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        chat.render(tokenizer, CONVERSATION)


def test_a_template_that_writes_nothing_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['words'] }}{% endfor %}"
    with pytest.raises(UserError, match="writes nothing of a conversation"):
        calibration_windows(chat_file(tmp_path, conversations(3)), tokenizer, 1, 8, 0)
