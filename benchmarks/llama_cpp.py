"""A real llama.cpp, called through its C interface in the shared library that a Python package
ships: tokens of a text, logits of tokens.
"""

from __future__ import annotations

import ctypes as c
import os
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, quants
from torch import Tensor

# Where `bash tests/serving.sh llama.cpp` installs that package.
PACKAGE = Path(__file__).resolve().parents[1] / ".serving" / "llama.cpp"
# Structures of settings are passed by value and have other fields in every version. Of these, which
# are set here, the places have not changed; what follows them is handed back as it came.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX = range(4)
WORDS = 256


class Settings(c.Structure):
    """More room than any version's settings take."""

    _fields_ = (("words", c.c_uint32 * WORDS),)


class Batch(c.Structure):
    """llama_batch: tokens, and for which of them logits are wanted."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.POINTER(c.c_int8)),
    )


LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)


def library(folder: Path) -> c.CDLL:
    """The library of the package that was installed into `folder`."""
    found = next(folder.glob("xllamacpp/xllamacpp*.so"))
    lib = c.CDLL(str(found))
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(lib, name).restype = Settings
    for name in (
        "llama_model_load_from_file",
        "llama_init_from_model",
        "llama_model_get_vocab",
        "llama_get_memory",
    ):
        getattr(lib, name).restype = c.c_void_p
    lib.llama_get_logits.restype = c.POINTER(c.c_float)
    lib.llama_model_chat_template.restype = c.c_char_p
    lib.llama_vocab_is_eog.restype = c.c_bool
    lib.llama_version.restype = c.c_char_p
    lib.llama_backend_init()
    return lib


class Model:
    """A GGUF file that llama.cpp has loaded. Close it when done.

    Args:
        context: tokens at most.
    """

    def __init__(self, lib: c.CDLL, file: Path, context: int = 1024):
        self.lib, self.messages = lib, []
        self._log = LOG(lambda _level, text, _: self.messages.append(text.decode(errors="replace")))
        lib.llama_log_set(self._log, None)
        model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError("".join(self.messages)[-2000:])
        self.model, self.vocab = (
            c.c_void_p(model),
            c.c_void_p(lib.llama_model_get_vocab(c.c_void_p(model))),
        )
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        settings = lib.llama_context_default_params()
        for place in (N_CTX, N_BATCH, N_UBATCH):
            settings.words[place] = context
        self.context = c.c_void_p(lib.llama_init_from_model(self.model, settings))
        assert self.context, "".join(self.messages)[-2000:]
        threads = len(os.sched_getaffinity(0))
        lib.llama_set_n_threads(self.context, threads, threads)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
        self.lib.llama_log_set(None, None)

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; special: with what the model adds, and its special tokens read as such."""
        data = text.encode()
        room = len(data) + 8
        ids = (c.c_int32 * room)()
        count = self.lib.llama_tokenize(
            self.vocab, data, len(data), ids, room, c.c_bool(special), c.c_bool(True)
        )
        assert count >= 0
        return list(ids[:count])

    def ends(self, token: int) -> bool:
        """Whether generation ends at a token."""
        return self.lib.llama_vocab_is_eog(self.vocab, token)

    def chat_template(self) -> str:
        return self.lib.llama_model_chat_template(self.model, None).decode()

    def logits(self, ids: list[int], fresh: bool = True) -> Tensor:
        """Logits [len(ids), vocabulary] float32 after each token; fresh: of a new text."""
        if fresh:
            memory = c.c_void_p(self.lib.llama_get_memory(self.context))
            self.lib.llama_memory_clear(memory, c.c_bool(True))
        count = len(ids)
        batch = Batch(
            n_tokens=count,
            token=(c.c_int32 * count)(*ids),
            logits=(c.c_int8 * count)(*[1] * count),
        )
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, (code, "".join(self.messages)[-500:])
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (count, self.size))
        return torch.from_numpy(found.copy())

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most probable next tokens, one after the other; the prompt left out."""
        logits, new = self.logits(ids)[-1], []
        for _ in range(count):
            new.append(int(logits.argmax()))
            logits = self.logits(new[-1:], fresh=False)[-1]
        return new


def in_float32(file: Path, target: Path) -> Path:
    """The same file with every weight as it stands for, in float32: what llama.cpp computes of it
    has no activations that it rounds to 8 bits, as it does to multiply them with blocks.
    """
    reader = GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if name[:5] != "GGUF."}
    writer = GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tuple(reversed(tensor.shape.tolist()))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
