"""Tokenizers as GGUF's vocabulary: which rules are named, which are refused, scores for merges."""

from __future__ import annotations

import json

import pytest
from conftest import WORDS, tiny_tokenizer
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.base.errors import UserError
from common.exporting.vocabulary import LLAMA_3, QWEN_2, TEKKEN, vocabulary_of

ROWS = 500
SPACE = "▁"


def byte_level(*rules, ignore_merges=False, normalizer=None):
    """The tiny tokenizer with other rules before its merges."""
    fast = tiny_tokenizer()
    backend = fast.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(rules))
    backend.model.ignore_merges = ignore_merges
    if normalizer:
        backend.normalizer = normalizer
    return fast


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior=behavior)


def bytes_only(use_regex=False, space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=use_regex)


DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    "rules, ignore_merges, name",
    [
        ([bytes_only(True)], False, "gpt-2"),
        ([DIGITS, bytes_only(True)], False, "smollm"),
        ([split(LLAMA_3), bytes_only()], True, "llama-bpe"),
        ([split(LLAMA_3), bytes_only()], False, "smaug-bpe"),
        ([split(QWEN_2), bytes_only()], False, "qwen2"),
        ([split(TEKKEN), bytes_only()], True, "tekken"),
    ],
)
def test_rules_that_llama_cpp_has(rules, ignore_merges, name):
    tokenizer = byte_level(*rules, ignore_merges=ignore_merges, normalizer=normalizers.NFC())
    found = vocabulary_of(tokenizer, [1], ROWS)
    assert (found.model, found.pre, found.scores) == ("gpt2", name, None)
    vocabulary = tokenizer.get_vocab()
    assert len(found.tokens) == len(found.types) == ROWS
    for token, index in vocabulary.items():
        assert found.tokens[index] == token
    assert found.types[:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert found.types[len(vocabulary) :] == [TokenType.UNUSED] * (ROWS - len(vocabulary))
    assert len(set(found.tokens)) == ROWS
    assert found.merges[0] in ("Ġ t", "e r", "Ġ b", "o w", "r e", "h e") or " " in found.merges[0]
    assert all(left + right in vocabulary for left, right in map(str.split, found.merges))
    assert found.templates == tokenizer.chat_template and not found.notes


@pytest.mark.parametrize(
    "rules, ignore_merges, normalizer",
    [
        ([split(LLAMA_3.replace("{1,3}", "{1,2}")), bytes_only()], True, None),
        ([split(LLAMA_3, "removed"), bytes_only()], True, None),
        ([split(QWEN_2), bytes_only()], True, None),
        ([bytes_only(True, space=True)], False, None),
        ([pre_tokenizers.Digits(individual_digits=False), bytes_only(True)], False, None),
        ([pre_tokenizers.Whitespace()], False, None),
        ([bytes_only(True)], False, normalizers.Lowercase()),
        ([bytes_only()], False, None),
    ],
)
def test_other_rules_are_refused(rules, ignore_merges, normalizer):
    """Also those that differ in one number."""
    tokenizer = byte_level(*rules, ignore_merges=ignore_merges, normalizer=normalizer)
    with pytest.raises(UserError, match="no rules of llama.cpp's are known"):
        vocabulary_of(tokenizer, [1], ROWS)


def test_other_algorithms_are_refused():
    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with pytest.raises(UserError, match="byte-pair"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=unigram), [1], ROWS)


def pieces(merges=None, normalizer=None, before=None):
    """A tokenizer as one made from a SentencePiece model: bytes, letters, then pieces by score."""
    words = [SPACE + word for word in dict.fromkeys(WORDS)]
    letters = sorted({letter for word in words for letter in word})
    endings = [word[-2:] for word in words if len(word) > 3]
    starts = [word[:end] for word in words for end in range(2, len(word) + 1)]
    found = dict.fromkeys([*endings, *starts])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens = dict.fromkeys([*tokens, *found])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if merges is None:
        merges = [
            (piece[:cut], piece[cut:])
            for piece in found
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        ]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    if before is None:
        backend.normalizer = normalizer or normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        backend.pre_tokenizer = before
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_pieces_get_scores_in_the_order_of_their_merges():
    tokenizer = pieces()
    found = vocabulary_of(tokenizer, [2], ROWS)
    assert (found.model, found.pre, found.merges) == ("llama", "default", None)
    assert found.space_prefix and found.adds == {"bos": True, "eos": False} and not found.notes
    assert found.types[:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    for text in (" ".join(WORDS), "they river", "the  race", "rivers"):
        assert sentencepiece(text, found) == tokenizer(text, add_special_tokens=False)["input_ids"]


def sentencepiece(text, vocabulary):
    """SentencePiece's algorithm: join the neighbours that make the piece of highest score, the
    leftmost of several.
    """
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    parts = list((" " + text).replace(" ", SPACE))
    while True:
        joined = [
            (-vocabulary.scores[ids[left + right]], place)
            for place, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
            if left + right in ids
        ]
        if not joined:
            return [ids[part] for part in parts]
        place = min(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_forms_of_the_space_before_a_text():
    replace = normalizers.Replace(" ", SPACE)
    assert not vocabulary_of(pieces(normalizer=replace), [2], ROWS).space_prefix
    for scheme, prefix in (("first", True), ("always", True), ("never", False)):
        before = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        found = vocabulary_of(pieces(before=before), [2], ROWS)
        # It puts none before a text that begins with one; llama.cpp does.
        assert found.space_prefix == prefix and len(found.notes) == prefix
    with pytest.raises(UserError, match="no rules"):
        vocabulary_of(pieces(before=pre_tokenizers.Metaspace(SPACE, split=True)), [2], ROWS)


def test_merges_that_scores_cannot_order_are_refused():
    """One is missing of those that make a piece, or two pieces' take turns."""
    tokenizer = pieces()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    made = ["".join(pair) for pair in merges]
    several = next(place for place, piece in enumerate(made) if made.count(piece) > 1)
    missing = merges[:several] + merges[several + 1 :]
    turns = [*merges[:several], *merges[several + 1 :], merges[several]]
    for wrong in (missing, turns):
        with pytest.raises(UserError, match="not that of a SentencePiece model"):
            vocabulary_of(pieces(merges=wrong), [2], ROWS)


def test_stop_tokens_are_those_of_generate():
    """The tokenizer's own eos comes first where generation stops at it, else it is none."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.eos_token_id == 1
    for stops, expected in (
        ([1], {"eos": 1}),
        ([5, 1], {"eos": 1, "eot": 5}),
        ([5], {"eos": 5}),
        ([7, 5, 1], {"eos": 1, "eot": 7, "eom": 5}),
        ([], {"eos": 1}),
    ):
        found = vocabulary_of(tokenizer, stops, ROWS).special
        assert {name: found[name] for name in ("eos", "eot", "eom") if name in found} == expected


def test_tokens_without_a_row():
    """An added one is left out, and a line says so; one that merges make is an error."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<more>"), AddedToken("<wide>", lstrip=True, special=True)])
    found = vocabulary_of(tokenizer, [1], size + 2)
    assert found.types[size:] == [TokenType.USER_DEFINED, TokenType.CONTROL]
    assert len(found.notes) == 1 and "<wide>" in found.notes[0]
    (note,) = (note for note in vocabulary_of(tokenizer, [1], size).notes if "row" in note)
    assert "<more>, <wide>" in note
    with pytest.raises(UserError, match="a row for each"):
        vocabulary_of(tokenizer, [1], size - 1)


def test_several_chat_templates():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    found = vocabulary_of(tokenizer, [1], ROWS).templates
    assert found == [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]


def test_what_is_added_to_a_text_is_asked_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|start|>"
    for single, expected in (
        ("$A", {"bos": False, "eos": False}),
        ("<|start|> $A", {"bos": True, "eos": False}),
        ("<|start|> $A <|end|>", {"bos": True, "eos": True}),
        ("$A <|end|>", {"bos": False, "eos": True}),
    ):
        special = [("<|start|>", 0), ("<|end|>", 1)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
        assert vocabulary_of(tokenizer, [1], ROWS).adds == expected
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=special
    )
    with pytest.raises(UserError, match="adds other tokens"):
        vocabulary_of(tokenizer, [1], ROWS)
