"""A transformers tokenizer as GGUF's vocabulary.

llama.cpp has its own code for how each family cuts text into words, and a file names which to use.
Here the name follows from what the tokenizer's own file says, rule by rule; a tokenizer with other
rules is refused, as a wrong name cuts text wrongly and says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import GGUFWriter, TokenType

from common.base.errors import UserError

# What cuts text into words before bytes are merged: a regular expression, digits one by one, or the
# rule that byte-level tokenizers bring with them.
DIGITS, BYTE_LEVEL = "digits", "byte-level"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}"
QWEN_2 = rf"{_CONTRACTIONS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names, by these rules and by whether a word that is a token is taken before any merge.
_NAMES = {
    ((BYTE_LEVEL,), False): "gpt-2",
    ((DIGITS, BYTE_LEVEL), False): "smollm",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "smaug-bpe",
    ((QWEN_2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
# What stands for a space in a SentencePiece vocabulary.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass
class Vocabulary:
    """What a file says of the tokenizer.

    model, pre: llama.cpp's names of the algorithm and of the rules before it.
    tokens, types: by id.
    merges: pairs, "left right", in the order in which they are tried; scores: by id, of which the
        higher is merged first. One of them is None.
    special: ids by GGUF's name (bos, eos, eot, eom, unk, pad).
    adds: whether bos and eos are added to a text; space_prefix: a space before it.
    templates: of chats, one or several by name.
    notes: in what llama.cpp cuts text otherwise, as far as that is known; not part of the file.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    adds: dict[str, bool]
    space_prefix: bool
    templates: str | list[dict] | None
    notes: tuple[str, ...]

    def write(self, writer: GGUFWriter) -> None:
        """Put it into a file's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        for name, added in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(added)
        writer.add_add_space_prefix(self.space_prefix)
        if self.templates:
            writer.add_chat_template(self.templates)


def vocabulary_of(tokenizer, stop_ids: list[int], rows: int) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    Args:
        stop_ids: tokens at which generation ends; the first is called eos, unless the tokenizer's
            own eos is among them.
        rows: of the embedding; ids without a token get a placeholder.
    Raises:
        UserError: a tokenizer that llama.cpp has no rules for, or one with more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {"type": None}}
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"GGUF export knows byte-pair tokenizers alone, not {model['type'] or 'slow ones'}"
        )
    tokens, types = _tokens(content, rows)
    prefix = _sentencepiece_prefix(content)
    of_pieces = prefix is not None
    if of_pieces:
        _name_pieces(tokenizer.unk_token_id, tokens, types)
    return Vocabulary(
        model="llama" if of_pieces else "gpt2",
        pre="default" if of_pieces else _rules(content),
        tokens=tokens,
        types=types,
        merges=None if of_pieces else [" ".join(pair) for pair in _pairs(model)],
        scores=_scores(model, rows) if of_pieces else None,
        special={
            name: index for name, index in _special(tokenizer, stop_ids).items() if index < rows
        },
        adds=_adds(tokenizer),
        space_prefix=bool(prefix),
        templates=_templates(tokenizer),
        notes=tuple(_notes(content, bool(prefix), rows)),
    )


def _tokens(content: dict, rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids that the embedding has a row for."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types: list[int] = [TokenType.UNUSED] * rows
    found = {index: (token, TokenType.NORMAL) for token, index in content["model"]["vocab"].items()}
    if max(found) >= rows:
        raise UserError(
            f"the tokenizer has a token {max(found)}, the embedding {rows} rows: GGUF needs a "
            "row for each"
        )
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        found[token["id"]] = (token["content"], kind)
    for index, (token, kind) in found.items():
        if index < rows:
            tokens[index], types[index] = token, kind
    return tokens, types


def _notes(content: dict, prefix: bool, rows: int) -> Iterator[str]:
    """In what llama.cpp cuts text otherwise; prefix: it puts a space before a text."""
    if prefix and content["pre_tokenizer"]:
        yield (
            "llama.cpp puts a space before a text that begins with one, and after special tokens, "
            "where this tokenizer puts none"
        )
    added = content["added_tokens"]
    if beyond := [token["content"] for token in added if token["id"] >= rows]:
        yield f"tokens without a row in the embedding are left out ({', '.join(beyond[:3])})"
    wide = [token for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if wide:
        yield f"llama.cpp may not take the spaces around {wide[0]['content']} into it"


def _special(tokenizer, stop_ids: list[int]) -> dict[str, int]:
    own = tokenizer.eos_token_id
    stops = list(dict.fromkeys(stop_ids)) or [own]
    # llama.cpp ends at any of the three.
    ordered = [own, *(index for index in stops if index != own)] if own in stops else stops
    found = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(("eos", "eot", "eom"), ordered, strict=False)),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in found.items() if index is not None}


def _adds(tokenizer) -> dict[str, bool]:
    """What the tokenizer does, whatever its files say."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if ids == bos * before + plain + eos * after:
            return {"bos": before, "eos": after}
    raise UserError(
        "the tokenizer adds other tokens to a text than bos and eos, which GGUF cannot tell"
    )


def _templates(tokenizer) -> str | list[dict] | None:
    found = tokenizer.chat_template
    if isinstance(found, dict):
        return [{"name": name, "template": text} for name, text in found.items()]
    return found


def _parts(part: dict | None, inner: str) -> list[dict]:
    """A normalizer or pre-tokenizer as a list, sequences laid out."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for one in part[inner] for leaf in _parts(one, inner)]
    return [part]


def _rules(content: dict) -> str:
    """llama.cpp's name of what a byte-level tokenizer does before it merges."""
    rules, known = [], True
    for part in _parts(content["pre_tokenizer"], "pretokenizers"):
        kind = part["type"]
        if kind == "Split":
            known &= part["behavior"] == "Isolated" and not part["invert"]
            rules.append(part["pattern"].get("Regex"))
        elif kind == "Digits":
            known &= part["individual_digits"]
            rules.append(DIGITS)
        elif kind == "ByteLevel":
            known &= not part["add_prefix_space"]
            rules += [BYTE_LEVEL] if part["use_regex"] else []
        else:
            known = False
    # llama.cpp leaves text as it is where NFC would compose characters; most text is composed.
    normalizers = {part["type"] for part in _parts(content["normalizer"], "normalizers")}
    model = content["model"]
    plain = not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
    name = _NAMES.get((tuple(rules), bool(model.get("ignore_merges"))))
    if not (known and plain and name and normalizers <= {"NFC"}):
        cuts = ", ".join(
            [*sorted(normalizers - {"NFC"}), *(str(rule) for rule in rules)] or ["nothing"]
        )
        raise UserError(
            f"no rules of llama.cpp's are known that cut text as this tokenizer does ({cuts[:120]})"
        )
    return name


def _sentencepiece_prefix(content: dict) -> bool | None:
    """Whether a tokenizer made from a SentencePiece model puts a space before a text; None for one
    that was not.
    """
    normalizers = _parts(content["normalizer"], "normalizers")
    before = _parts(content["pre_tokenizer"], "pretokenizers")
    if not content["model"].get("byte_fallback"):
        return None
    if [part["type"] for part in before] == ["Metaspace"] and not normalizers:
        part = before[0]
        if part["replacement"] != _SPACE or part.get("split", True):
            return None
        return part["prepend_scheme"] != "never"
    kinds = [part["type"] for part in normalizers]
    if before or not kinds or kinds not in (["Replace"], ["Prepend", "Replace"]):
        return None
    replaced = normalizers[-1]
    if (replaced["pattern"], replaced["content"]) != ({"String": " "}, _SPACE):
        return None
    return kinds[0] == "Prepend"


def _pairs(model: dict) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _name_pieces(unknown: int | None, tokens: list[str], types: list[int]) -> None:
    """Say in `types`, by id, which tokens of a SentencePiece vocabulary are single bytes, and that
    one stands for what is unknown.
    """
    for index, token in enumerate(tokens):
        single = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if single and types[index] == TokenType.NORMAL:
            types[index] = TokenType.BYTE
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN


def _scores(model: dict, rows: int) -> list[float]:
    """Scores by id that make SentencePiece's algorithm, which joins the two neighbours that make
    the piece of highest score, join what the tokenizer's list of pairs does.

    Raises:
        UserError: they cannot: a pair is missing that makes a piece, or pairs of several pieces
            take turns.
    """
    vocabulary, scores = model["vocab"], [0.0] * rows
    pairs, last, seen = set(), None, set()
    regular = True
    for rank, (left, right) in enumerate(_pairs(model)):
        piece = left + right
        if piece != last:
            regular &= piece not in seen
            seen.add(piece)
            last = piece
            scores[vocabulary[piece]] = -1.0 - rank
        pairs.add((left, right))
    for piece in vocabulary:
        regular &= piece not in seen or all(
            (piece[:cut], piece[cut:]) in pairs
            for cut in range(1, len(piece))
            if piece[:cut] in vocabulary and piece[cut:] in vocabulary
        )
    if not regular:
        raise UserError(
            "the tokenizer's list of merges is not that of a SentencePiece model: GGUF cannot tell "
            "its order"
        )
    return scores
