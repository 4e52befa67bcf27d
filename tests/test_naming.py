"""Whose results they are: a quantized folder is never a baseline; namesakes share no folder."""

import json
import shutil

import pytest
from conftest import ROOT, assert_user_error, run_script, save_tiny

from common.checkpoint.writer import METADATA_FILE

SMALL = [
    "--data",
    "demo",
    "--limit",
    2,
    "--windows",
    2,
    "--window-length",
    48,
    "--tasks",
    "arc,perplexity",
]


@pytest.fixture(scope="module")
def bare(tiny, tmp_path_factory):
    """A checkpoint that does not say what it was made from."""
    output = tmp_path_factory.mktemp("bare") / "hqq-4bit"
    result = run_script(
        ROOT / "quantize_hqq.py", "--model", tiny, "--output", output, "--no-save-metadata"
    )
    assert result.returncode == 0, result.stderr
    return output


def evaluate(folder, results, *more, cwd=ROOT):
    return run_script(
        ROOT / "common/evaluation.py",
        "--model-path",
        folder,
        "--results-dir",
        results,
        *SMALL,
        *more,
        cwd=cwd,
    )


def test_what_a_quantized_folder_was_made_from_is_asked_for(bare, tiny, tmp_path):
    results = tmp_path / "results"
    assert_user_error(evaluate(bare, results), "quantized", "--baseline")
    compare = [
        ROOT / "compare_to_baseline.py",
        "--quantized",
        bare,
        "--results-dir",
        results,
        *SMALL,
    ]
    assert_user_error(run_script(*compare), "quantized", "--baseline")
    assert not results.exists()
    assert evaluate(bare, results, "--baseline", tiny).returncode == 0
    assert [file.name for file in (results / tiny.name).glob("*.json")] == ["hqq-4bit.json"]
    document = json.loads((results / tiny.name / "hqq-4bit.json").read_text())
    assert document["configuration"] == "hqq-4bit" and document["source"] == str(tiny)
    assert (
        document["tasks"]["perplexity"]["divergence"]["kl_mean"] > 1e-4
    )  # from the 16-bit model, not from itself
    found = run_script(*compare, "--baseline", tiny, "--json")
    content = json.loads(found.stdout)
    perplexity = next(row for row in content["metrics"] if row["metric"] == "perplexity")
    assert (
        content["configuration"] == "hqq-4bit" and perplexity["baseline"] != perplexity["quantized"]
    )


def test_a_name_of_ours_is_for_our_own(bare, tiny, tmp_path, monkeypatch):
    """Somebody else's folder would stand in our row, under --name or by its own name."""
    asked = tmp_path / "results", "--baseline", tiny

    def refused(folder, *more, name="gptq-4bit"):
        assert_user_error(
            evaluate(folder, *asked, *more), f"this project's {name},", f"such as theirs-{name}"
        )
        assert not (tmp_path / "results").exists()

    refused(bare, "--name", "gptq-4bit")
    refused(bare, "--name", "hqq-4bit", name="hqq-4bit")  # it does not say that it is
    theirs = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    copy(bare, tmp_path / "gptq-4bit", **theirs)
    refused(tmp_path / "gptq-4bit")
    copy(bare, tmp_path / "llm" / "hqq-4bit")
    (tmp_path / "llm/hqq-4bit/recipe.yaml").write_text("")
    refused(tmp_path / "llm/hqq-4bit", name="hqq-4bit")
    # Our own, with metadata, of another method or of other bits.
    words = ("--model", tiny, "--output", tmp_path / "own", "--bits", 8)
    assert run_script(ROOT / "quantize_hqq.py", *words).returncode == 0
    for name in ("gptq-8bit", "hqq-4bit"):
        refused(tmp_path / "own", "--name", name, name=name)
    assert evaluate(tmp_path / "own", *asked, "--name", "hqq-8bit").returncode == 0
    # Without metadata where the batch keeps it.
    monkeypatch.setattr("common.results.naming.MODELS_FOLDER", tmp_path / "models")
    copy(bare, tmp_path / "models/tiny/hqq-4bit")
    usual = tmp_path / "models/tiny/hqq-4bit"
    assert evaluate(usual, *asked, "--name", "hqq-4bit").returncode == 0


def copy(source, target, **config):
    shutil.copytree(source, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_checkpoints_from_elsewhere(tiny, tmp_path, method):
    folder = copy(tiny, tmp_path / "Tiny-GPTQ-Int4", quantization_config={"quant_method": method})
    assert_user_error(
        evaluate(folder, tmp_path / "results"), "Tiny-GPTQ-Int4 is quantized", "--baseline"
    )
    assert_user_error(
        run_script(ROOT / "compare_to_baseline.py", "--quantized", folder),
        "is quantized",
        "--baseline",
    )
    assert_user_error(
        run_script(ROOT / "common/baseline.py", "--model", folder),
        "quantized already",
        "16-bit model",
    )
    assert not (tmp_path / "results").exists()


def test_a_quantized_model_given_as_baseline(bare, tmp_path):
    result = run_script(
        ROOT / "compare_to_baseline.py",
        "--quantized",
        bare,
        "--baseline",
        bare,
        "--results-dir",
        tmp_path,
    )
    assert_user_error(result, "is no baseline", "--baseline")


@pytest.fixture(scope="module")
def described(tiny, tmp_path_factory):
    """A checkpoint with metadata."""
    output = tmp_path_factory.mktemp("described") / "hqq-4bit"
    result = run_script(ROOT / "quantize_hqq.py", "--model", tiny, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


def with_metadata(described, target, change):
    """A copy of a checkpoint with changed metadata: what `change` makes of the document."""
    shutil.copytree(described, target)
    document = change(json.loads((described / METADATA_FILE).read_text()))
    (target / METADATA_FILE).write_text(json.dumps(document))
    return target


def test_a_baseline_that_contradicts_the_metadata(described, tiny, tiny_models, tmp_path, capsys):
    from common.base.errors import UserError
    from common.results.naming import subject_of

    other = str(tiny_models["llama", False])
    with pytest.raises(UserError, match=f"was made from {tiny}, not from {other}; leave"):
        subject_of(described, other, tmp_path)
    for same in (None, str(tiny), f"{tiny}/"):
        assert subject_of(described, same, tmp_path).source == str(tiny)
    moved = with_metadata(
        described, tmp_path / "x" / "hqq-4bit", lambda d: {**d, "model": {"source": "/no/longer"}}
    )
    assert subject_of(moved, str(tiny), tmp_path).source == str(tiny)
    assert "made from /no/longer, which is not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda document: {**document, "model": None},
        lambda document: {**document, "model": {"source": 3}},
    ],
)
def test_damaged_metadata_is_one_line(described, tiny, tmp_path, change):
    folder = with_metadata(described, tmp_path / "hqq-4bit", change)
    compare = [ROOT / "compare_to_baseline.py", "--quantized", folder, "--results-dir", tmp_path]
    for more in ([], ["--baseline", tiny]):
        result = run_script(*compare, *more, *SMALL)
        assert_user_error(result, METADATA_FILE, "damaged", "--baseline")


@pytest.mark.parametrize("key", ["bytes", "linears", "probe", "calibration"])
def test_metadata_that_lacks_something_stops_the_evaluation_before_its_tasks(
    described, tmp_path, monkeypatch, key
):
    from common.running import runtime

    def no_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(runtime, "load_for_running", no_model)
    folder = with_metadata(
        described,
        tmp_path / "hqq-4bit",
        lambda d: {name: value for name, value in d.items() if name != key},
    )
    assert_user_error(evaluate(folder, tmp_path / "results"), METADATA_FILE, "damaged", key)
    assert not (tmp_path / "results").exists()


def test_names_that_are_taken_and_flags_that_do_not_fit(bare, tiny, tmp_path):
    shutil.copytree(bare, tmp_path / "baseline")
    assert_user_error(
        evaluate(tmp_path / "baseline", tmp_path, "--baseline", tiny),
        "is quantized",
        "rename the folder",
    )
    assert_user_error(
        evaluate(tiny, tmp_path, "--baseline", tiny), "is not quantized", "leave --baseline out"
    )


def test_null_is_not_quantized(tiny, tmp_path):
    from common.results.naming import subject_of

    folder = copy(tiny, tmp_path / "plain", quantization_config=None)
    assert subject_of(folder, results_dir=tmp_path).configuration == "baseline"


def test_verify_claims_nothing_about_an_unknown_baseline(bare):
    result = run_script(ROOT / "verify_model.py", "--model-path", bare)
    assert result.returncode == 0
    line = next(line for line in result.stdout.splitlines() if "perplexity" in line)
    assert line.startswith("SKIP") and "no baseline known" in line and "--baseline" in line
    last = result.stdout.splitlines()[-1]
    assert "not fully verified" in last and last.endswith(
        "files unchanged, output errors, recorded logits, perplexity"
    )


def test_verify_is_full_with_metadata(described):
    result = run_script(ROOT / "verify_model.py", "--model-path", described)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == f"{described}: verified"


@pytest.fixture(scope="module")
def two_owners(tmp_path_factory):
    """A folder to work in with ours/Tiny and theirs/Tiny, which are different models."""
    place = tmp_path_factory.mktemp("owners")
    for seed, owner in enumerate(("ours", "theirs")):
        save_tiny(place / owner / "Tiny", "llama", True, seed=seed)
    return place


def test_two_models_of_one_name_share_nothing(two_owners):
    for owner in ("ours", "theirs"):
        for words in (
            ["quantize_hqq.py", "--model", f"{owner}/Tiny"],
            ["common/baseline.py", "--model", f"{owner}/Tiny", *SMALL],
        ):
            result = run_script(ROOT / words[0], *words[1:], cwd=two_owners)
            assert result.returncode == 0, result.stderr
    for name in ("Tiny", "theirs--Tiny"):
        record = json.loads((two_owners / "models" / name / "hqq-4bit" / METADATA_FILE).read_text())
        assert record["model"]["source"] == f"{'theirs' if '--' in name else 'ours'}/Tiny"
        result = evaluate(f"models/{name}/hqq-4bit", "results", cwd=two_owners)
        assert result.returncode == 0, result.stderr
        documents = [
            json.loads(file.read_text())
            for file in sorted((two_owners / "results" / name).glob("*.json"))
        ]
        assert [document["configuration"] for document in documents] == ["baseline", "hqq-4bit"]
        assert len({document["source"] for document in documents}) == 1
        assert documents[1]["tasks"]["perplexity"]["original"] == documents[0]["checkpoint"]
    assert "files of theirs/Tiny are kept under theirs--Tiny" in result.stdout


def test_names_by_source(tmp_path, monkeypatch):
    from common.results.naming import filed_as

    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    assert filed_as("meta-llama/Llama-3.2-1B-Instruct", results) == "Llama-3.2-1B-Instruct"
    (tmp_path / "models/SmolLM2-135M-Instruct/baseline").mkdir(parents=True)
    assert (
        filed_as("demo", results)
        == filed_as("models/SmolLM2-135M-Instruct/baseline", results)
        == "SmolLM2-135M-Instruct"
    )
    # The demo is not the model of the same name on the hub, which therefore gets another.
    assert (
        filed_as("HuggingFaceTB/SmolLM2-135M-Instruct", results)
        == "HuggingFaceTB--SmolLM2-135M-Instruct"
    )
    (results / "X").mkdir(parents=True)
    (results / "X" / "status.json").write_text(
        json.dumps({"baseline": {"state": "failed", "source": "one/X"}})
    )
    assert filed_as("one/X", results) == "X" and filed_as("two/X", results) == "two--X"
    (results / "two--X").mkdir()
    (results / "two--X" / "baseline.json").write_text(
        json.dumps({"source": "two/X", "model": "two--X"})
    )
    shutil.rmtree(results / "X")
    assert filed_as("two/X", results) == "two--X"  # what has a name keeps it
