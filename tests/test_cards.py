"""What kernels, types and launches GPUs of different compute capability get, without a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, assert_user_error, build_tiny, run_script, tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode

from common.base import gpu
from common.base.device import resolve_dtype
from common.base.errors import UserError
from common.kernels import dispatch, inference, rounding
from common.kernels.forms import PackedWeight, Rotary, Rounded, Rounding, TwoBytes
from common.model import fused
from common.numerics.grid import Grid, codes_per_token
from common.running.runtime import load_for_running, load_model
from common.tasks.language_model import HarnessModel
from common.text.probe import overflow
from common.walk.inputs import root_weights

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """A function that makes the GPU one of some compute capability, and returns the list of the
    kernels that are called from then on. Tensors on it have no memory, kernels return nothing of
    use.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    from common.kernels import attention_triton, inference_triton, products_triton, rounding_triton

    called: list[str] = []

    def note(name, result):
        def kernel(*arguments, **_):
            called.append(name)
            return result(*arguments)

        return kernel

    def product(inputs, weight, *_):
        if isinstance(inputs, TwoBytes):
            called[-1] += " on bytes"
        return torch.empty(
            len(getattr(inputs, "codes", inputs)),
            len(weight.packed),
            device="cuda",
            dtype=torch.float16,
        )

    results = {
        products_triton: {
            "packed_matmul": product,
            "integer_matmul": product,
            "row_matmul": product,
            "unpack": lambda weight, dtype: torch.empty(weight.shape, device="cuda", dtype=dtype),
        },
        inference_triton: {
            "silu_mul": lambda gate, *_: gate,
            "largest_index": lambda values: values,
            "round_rows": lambda inputs, rounding: (
                TwoBytes(*[inputs] * 3, inputs.dtype) if rounding.block else inputs
            ),
            "add_rms_norm": lambda hidden, *_: hidden,
        },
        attention_triton: {
            "attend": lambda projected, *_: projected,
            "rotate_heads": lambda *_: None,
        },
        rounding_triton: {"round_block": lambda *_: None},
    }
    for module, functions in results.items():
        for name, result in functions.items():
            monkeypatch.setattr(module, name, note(name, result))
    monkeypatch.setattr(dispatch, "triton_works", lambda: True)

    def start(*capability: int) -> list[str]:
        monkeypatch.setattr(gpu, "properties", lambda: gpu.Properties(capability, 64 << 10))
        called.clear()
        return called

    return start


def on_card(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(size, device="cuda", dtype=dtype)


def weight_of(bits: int) -> PackedWeight:
    packed = on_card(256, 512 * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8)
    return PackedWeight(packed, on_card(256, 4 if bits == 4 else 1), None, bits)


@pytest.mark.parametrize(
    ("capability", "several", "more", "many"),
    [
        ((6, 1), [], [], []),
        ((7, 5), ["unpack"], ["unpack"], ["unpack"]),
        ((8, 6), ["round_rows", "packed_matmul on bytes"], ["packed_matmul"], ["unpack"]),
        ((9, 0), ["round_rows", "packed_matmul on bytes"], ["packed_matmul"], ["unpack"]),
    ],
)
def test_packed_products_by_card(launched, capability, several, more, many):
    """Without tensor cores in Triton weights are unpacked before a product with several rows."""
    with FakeTensorMode():
        for rows, expected in (
            (1, ["packed_matmul"] if several else []),
            (2, several),
            (64, several),
            (65, more),
            (128, more),
            (129, many),
        ):
            called = launched(*capability)
            inputs, weight = on_card(rows, 512), weight_of(4)
            assert inference.packed_matmul(inputs, weight).shape == (rows, 256)
            assert called == expected, rows
            bytes_taken = "packed_matmul on bytes" in expected
            wanted = inference.wanted_rounding(inputs, weight)
            assert wanted == (Rounding(16, 128) if bytes_taken else None)


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_on_floats(launched, group, dtype):
    """Of inputs in float32, which integers of 16 bits would not do justice, and of small blocks."""
    with FakeTensorMode():
        for out, most in ((256, 128), (16384, 256)):
            most = most if dtype == torch.float16 else 64
            scale = on_card(out, 768 // group, dtype=dtype)
            weight = PackedWeight(on_card(out, 384, dtype=torch.uint8), scale, None, 4)
            for rows, expected in (
                *[(rows, ["packed_matmul"]) for rows in (2, 64, most)],
                (most + 1, ["unpack"]),
            ):
                called = launched(9, 0)
                inference.packed_matmul(on_card(rows, 768, dtype=dtype), weight)
                assert called == expected, rows


@pytest.mark.parametrize(
    ("capability", "one", "several", "many"),
    [
        ((6, 1), [], [], []),
        ((7, 5), ["packed_matmul"], ["unpack"], ["unpack"]),
        ((8, 0), ["integer_matmul"], ["integer_matmul"], ["integer_matmul"]),
        ((12, 0), ["integer_matmul"], ["integer_matmul"], ["integer_matmul"]),
    ],
)
def test_integer_products_by_card(launched, capability, one, several, many):
    """What smoothquant-8bit runs on. Before 8.0 Triton has no products of integers, cuBLAS some."""
    with FakeTensorMode():
        for rows, expected in ((1, one), (2, several), (64, several), (200, many)):
            called = launched(*capability)
            rounded = Rounded(on_card(rows, 512, dtype=torch.int8), on_card(rows, 1))
            assert inference.integer_matmul(rounded, weight_of(8)).shape == (rows, 256)
            assert called == expected, rows


@pytest.mark.parametrize(
    ("capability", "kernel"), [((7, 0), False), ((7, 5), True), ((8, 9), True)]
)
def test_other_kernels_by_card(launched, capability, kernel):
    """All that has no product of matrices runs from 7.5 on; on older GPUs each is its twin."""
    with FakeTensorMode():
        called = launched(*capability)
        hidden, table = on_card(2, 64), on_card(40, 16)
        steps = {
            "round_rows": lambda: inference.round_rows(hidden, Rounding(8)),
            "add_rms_norm": lambda: inference.add_rms_norm(hidden, None, on_card(64), 1e-5),
            "silu_mul": lambda: inference.silu_mul(hidden, hidden),
            "largest_index": lambda: inference.largest_index(hidden),
            "unpack": lambda: inference.unpack(weight_of(4), torch.float16),
        }
        if kernel:  # the twins take slices
            block, codes = on_card(8, 4, dtype=torch.float32), on_card(8, 4, dtype=torch.int8)
            steps |= {
                "attend": lambda: inference.attend(
                    hidden, Rotary(table, table), on_card(2, dtype=torch.long), table, table, 1.0
                ),
                "rotate_heads": lambda: inference.rotate_heads(on_card(1, 5, 2, 16), table, table),
                "row_matmul": lambda: inference.row_matmul(on_card(1, 512), weight_of(4)),
                "round_block": lambda: rounding.round_block(
                    *[block] * 5, Grid(4, 32), codes, block
                ),
            }
        for name, step in steps.items():
            called.clear()
            step()
            assert called == ([name] if kernel else []), name
        assert dispatch.use_triton(hidden) is kernel


@pytest.mark.parametrize(
    ("capability", "overlap"), [((7, 5), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_launches_overlap_from_hopper_on(launched, capability, overlap):
    """And loads on their way fit the GPU."""
    launched(*capability)
    from common.kernels.launch_triton import launch, stages

    assert launch() == ({"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False})
    assert [stages(5, size) for size in (1 << 10, 20 << 10, 100 << 10)] == [5, 2, 1]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_default_type_by_card(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", torch.device("cuda", 0)) == expected
    assert resolve_dtype("bfloat16", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("auto", CPU) == torch.float32


def test_attention_without_flash_attention(tiny_models, monkeypatch):
    """Keys are repeated for kernels that cannot share them; the outcome is the same."""
    monkeypatch.setattr(fused, "_has_kernels", lambda hidden: True)
    asked = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, **arguments):
        asked.append((key.shape[1] == query.shape[1], arguments["enable_gqa"]))
        return attention(query, key, value, **arguments)

    monkeypatch.setattr(fused.functional, "scaled_dot_product_attention", watch)
    tokens, outputs = torch.arange(2, 52).view(1, 50), []
    for capability, dtype in (
        ((8, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.float32),
    ):
        monkeypatch.setattr(
            gpu, "properties", lambda capability=capability: gpu.Properties(capability, 64 << 10)
        )
        model, _ = load_model(tiny_models["llama", True], CPU, dtype)
        fused.fuse_layers(model)
        asked.clear()
        with torch.inference_mode():
            outputs.append(model(tokens, use_cache=False).logits.float())
        assert set(asked) == {(False, True) if len(outputs) == 1 else (True, False)}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_of_large_float16_activations(generator, bits):
    """Up to the largest float16: finite scales, and errors of at most half a step."""
    inputs = torch.randn(6, 64, generator=generator).half()
    inputs[:, 5] = torch.tensor([65504.0, -65504.0, 40000.0, 33000.0, 1.0, 0.0]).half()
    codes, scale = codes_per_token(inputs, bits)
    exact = inputs.double().abs().amax(1, keepdim=True) * 2 / ((1 << bits) - 1)
    torch.testing.assert_close(scale.double(), exact, rtol=2**-10, atol=0)
    # The codes are rounded to float16 before they become integers.
    assert (
        (codes.double() * scale.double() - inputs.double()).abs()
        <= 0.51 * scale.double() + inputs.abs() * 2**-8
    ).all()


def test_token_weights_stay_in_float16(generator):
    """Tokens of next to no size count as much as float16 allows; the others as before."""
    rows, lag = (
        torch.randn(8, 32, generator=generator).half(),
        100 * torch.randn(8, 16, generator=generator).half(),
    )
    size = torch.tensor([1e-6, 1e-3, 1e-1, 1.0, 10.0, 300.0, 5e-5, 0.02]).unsqueeze(1)
    root = root_weights(1 / size.square(), rows, lag)
    assert (
        torch.isfinite(root).all()
        and torch.isfinite(rows * root).all()
        and torch.isfinite(lag * root).all()
    )
    free = (
        0.5 / size * torch.maximum(rows.abs().amax(1), lag.abs().amax(1)).float().unsqueeze(1)
        < 15000
    ).squeeze(1)
    assert free.sum() == 5
    torch.testing.assert_close(root[free].double(), 1 / size[free].double(), rtol=1e-3, atol=0)
    assert torch.equal(
        root_weights(1 / size.square(), rows.bfloat16(), None), (1 / size).bfloat16()
    )


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """A model whose last layer adds up to more than float16 holds, though no linear does."""
    folder = tmp_path_factory.mktemp("overflowing") / "model"
    model = build_tiny("llama", tied=True)
    model.model.embed_tokens.weight.data[:, 0] = 60000.0
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[0] = layer.post_attention_layernorm.weight.data[0] = 0
    # The first channel of the hidden states is 60000; the last MLP makes 30000 of it and adds that.
    mlp, size = model.model.layers[1].mlp, 64**0.5
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.data.zero_()
    model.model.layers[1].post_attention_layernorm.weight.data[0] = 1 / size
    mlp.gate_proj.weight.data[:, 0], mlp.up_proj.weight.data[:, 0] = 10.0, 10.0
    mlp.down_proj.weight.data[0] = 300.0 / 128
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_beyond_float16_is_refused_before_it_runs(overflowing, monkeypatch):
    with pytest.raises(UserError, match="overflow in float16; use --dtype float32"):
        load_for_running(overflowing, CPU, torch.float16)
    load_for_running(overflowing, CPU, torch.float32)
    # Texts that take more than the one that was tried: a question's choices.
    model, tokenizer = load_model(overflowing, CPU, torch.float16)
    harness = HarnessModel(model, tokenizer)
    with pytest.raises(UserError, match="question's choices.*float16"):
        harness._loglikelihood_tokens([(("", ""), [5, 6], [7])])


def test_float32_is_no_way_out_of_float32():
    assert "--dtype float32" in str(overflow("a layer", torch.bfloat16))
    assert "--dtype" not in str(overflow("a layer", torch.float32))


def test_quantizing_a_model_whose_end_leaves_float16(overflowing, tmp_path):
    output = tmp_path / "out"
    result = run_script(
        ROOT / "quantize_hqq.py",
        "--model",
        overflowing,
        "--output",
        output,
        "--dtype",
        "float16",
        "--group-size",
        32,
    )
    assert_user_error(
        result, "the last layer or the head", "overflow in float16", "--dtype float32"
    )
    assert not output.exists()
