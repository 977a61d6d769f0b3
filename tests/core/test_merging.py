"""Merging models: what rules compute, what is written, what is refused, what is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import toolkit
from toolkit import DARE, TIES, Average, Magnitude, Slerp, TaskArithmetic, merge
from toolkit.__main__ import main
from toolkit.core import io
from toolkit.core.declare.catalogue import catalogue
from toolkit.core.states import streams, written
from toolkit.core.states.rules import Rule

RULES = [e.method for e in catalogue() if isinstance(e.method, type) and issubclass(e.method, Rule)]


def draw(seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "emb.weight": (scale * torch.randn(11, 4, generator=g)).to(dtype),
        "out.weight": (scale * torch.randn(6, 4, generator=g)).to(dtype),
        "out.bias": (scale * torch.randn(6, generator=g)).to(dtype),
    }


def family(n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[dict, list[dict]]:
    """A base and n models near it."""
    base = draw(0, dtype=dtype)
    moved = [draw(i, 0.1, dtype) for i in range(1, n + 1)]
    return base, [{name: base[name] + one[name] for name in base} for one in moved]


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.reshape(-1).double() for one in state.values()])


def folder(path: Path, state: dict[str, Tensor], shards: int = 1, words: str = "a b") -> Path:
    """A model folder in the Hugging Face layout."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "toy", "torch_dtype": "float32"}))
    (path / "tokenizer.json").write_text(words)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    names = list(state)
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        places |= dict.fromkeys(part, file)
        save_file(part, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_plain_rules_are_their_equations() -> None:
    base, models = family()
    rows, start = torch.stack([flat(m) for m in models]), flat(base)
    weights = [1.0, 2.0, -0.5]
    strength = torch.tensor(weights, dtype=torch.float64)
    mean = merge(None, models, Average, weights=weights)
    assert torch.allclose(flat(mean), strength @ rows / strength.sum(), atol=1e-6)
    summed = merge(base, models, TaskArithmetic(scale=0.3), weights=weights)
    assert torch.allclose(flat(summed), start + 0.3 * strength @ (rows - start), atol=1e-6)


@pytest.mark.parametrize("over", ["model", "tensor"])
def test_magnitude_and_ties_keep_the_largest_and_elect_signs(over: str) -> None:
    base, models = family()
    groups = [list(base)] if over == "model" else [[name] for name in base]
    kept = {}
    for group in groups:
        start = flat({n: base[n] for n in group})
        rows = torch.stack([flat({n: m[n] for n in group}) for m in models]) - start
        least = rows.abs().topk(int(0.3 * rows.shape[1]), dim=1).values[:, -1:]
        rows = rows.where(rows.abs() >= least - 1e-9, 0.0)
        sign = torch.where(rows.sum(dim=0) >= 0, 1.0, -1.0)
        agree = rows.sign() == sign
        mean = (rows * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
        kept[group[0]] = start + rows.sum(dim=0), start + mean
    largest = flat(merge(base, models, Magnitude(density=0.3, over=over)))
    elected = flat(merge(base, models, TIES(density=0.3, over=over)))
    assert torch.allclose(largest, torch.cat([one for one, _ in kept.values()]), atol=1e-6)
    assert torch.allclose(elected, torch.cat([two for _, two in kept.values()]), atol=1e-6)


def test_dare_keeps_a_share_scaled_up_and_its_seed_decides() -> None:
    base = {"w": torch.zeros(200, 50)}
    model = {"w": torch.ones(200, 50)}
    one = merge(base, [model], DARE(drop=0.75), seed=3)["w"]
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert abs(float((one > 0).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 10_000) ** 0.5
    assert torch.equal(one, merge(base, [model], DARE(drop=0.75), seed=3)["w"])
    assert not torch.equal(one, merge(base, [model], DARE(drop=0.75), seed=4)["w"])
    both = merge(base, [model, model], DARE(drop=0.75), seed=3)["w"]
    assert set(both.unique().tolist()) == {0.0, 4.0, 8.0}, "each model has a mask of its own"


def test_slerp_ends_at_its_models_and_keeps_equal_norms() -> None:
    a, b = draw(1), draw(2)
    for t, one in ((0.0, a), (1.0, b)):
        assert torch.allclose(flat(merge(None, [a, b], Slerp(t=t))), flat(one), atol=1e-6)
    a = {"w": a["emb.weight"] / a["emb.weight"].norm()}
    b = {"w": b["emb.weight"] / b["emb.weight"].norm()}
    assert float(merge(None, [a, b], Slerp(t=0.3))["w"].norm()) == pytest.approx(1.0, abs=1e-6)
    close = {"w": a["w"] * (1 + 1e-5)}
    assert torch.allclose(merge(None, [a, close], Slerp)["w"], a["w"], atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_pieces_do_not_change_the_result(rule: type[Rule], monkeypatch) -> None:
    base, models = family(rule.models or 3)
    whole = merge(base, models, rule)
    monkeypatch.setattr(streams, "PIECE", 5)
    pieces = merge(base, models, rule)
    for name in whole:
        assert torch.allclose(whole[name], pieces[name], atol=1e-6), name


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_files_and_memory_give_the_same_and_shards_resume(rule, tmp_path, monkeypatch) -> None:
    base, models = family(rule.models or 3)
    expected = merge(base, models, rule, seed=5)
    start = folder(tmp_path / "base", base, shards=2)
    given = [folder(tmp_path / f"m{i}", m, shards=1 + i % 2) for i, m in enumerate(models)]
    out = merge(start, given, rule, seed=5, out=tmp_path / "out", shard_bytes=120, progress=False)
    found = tensors(out)
    assert {name: one.tolist() for name, one in found.items()} == {
        name: one.tolist() for name, one in expected.items()
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in base.values())
    assert (out / "tokenizer.json").read_text() == "a b"
    assert (out / "1_Pooling" / "config.json").is_file()

    calls = []

    class Interrupted(Exception):
        pass

    real = written._write

    def once(path: Path, *rest) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            raise Interrupted
        real(path, *rest)

    monkeypatch.setattr(written, "_write", once)
    again = tmp_path / "again"
    with pytest.raises(Interrupted):
        merge(start, given, rule, seed=5, out=again, shard_bytes=120, progress=False)
    assert not again.exists()
    merge(start, given, rule, seed=5, out=again, shard_bytes=120, progress=False)
    assert len(calls) == len(set(calls)) + 1, "only the shard that was lost is written again"
    assert {n: t.tolist() for n, t in tensors(again).items()} == {
        n: t.tolist() for n, t in found.items()
    }
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in out.iterdir())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_interrupted_merge_with_another_recipe_starts_anew(tmp_path, monkeypatch) -> None:
    base, models = family()
    start = folder(tmp_path / "base", base)
    given = [folder(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    real = written._write
    monkeypatch.setattr(written, "_write", lambda *args: real(*args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(start, given, DARE, seed=1, out=tmp_path / "out", progress=False)
    monkeypatch.setattr(written, "_write", real)
    out = merge(start, given, DARE, seed=2, out=tmp_path / "out", progress=False)
    fresh = merge(base, models, DARE, seed=2)
    assert {n: t.tolist() for n, t in tensors(out).items()} == {
        n: t.tolist() for n, t in fresh.items()
    }


def test_a_full_disk_is_named_before_and_during(tmp_path, monkeypatch) -> None:
    base, models = family()
    start = folder(tmp_path / "base", base)
    given = [folder(tmp_path / f"m{i}", m) for i, m in enumerate(models)]
    usage = written.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(written.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(io.DiskFull):
        merge(start, given, Average, out=tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_policies_for_statistics_whole_numbers_and_heads() -> None:
    base, models = family(2)
    for i, state in enumerate([base, *models]):
        state["bn.running_mean"] = torch.full((3,), float(i))
        state["bn.num_batches_tracked"] = torch.tensor(10 * i)
        state["head.weight"] = torch.full((2 + i, 4), float(i))
    with pytest.raises(ValueError, match=r"head\.weight: \(2, 4\) float32 in the base; \(3, 4\)"):
        merge(base, models, Average)
    merged = merge(base, models, Average, heads=2)
    assert merged["head.weight"].shape == (4, 4)
    assert merged["bn.running_mean"].tolist() == [1.5] * 3
    assert merged["bn.num_batches_tracked"].item() == 10
    kept = merge(base, models, Average, heads="base", buffers="base")
    assert kept["head.weight"].shape == (2, 4)
    assert kept["bn.running_mean"].tolist() == [0.0] * 3
    assert merge(base, models, Average, heads="base", buffers=2)["bn.running_mean"][0] == 2
    with pytest.raises(ValueError, match="heads=3"):
        merge(base, models, Average, heads=3)


def test_targets_choose_and_the_others_stay_as_in_the_base() -> None:
    base, models = family()
    merged = merge(base, models, Average, targets="out.*")
    assert torch.equal(merged["emb.weight"], base["emb.weight"])
    assert not torch.equal(merged["out.bias"], base["out.bias"])
    matrices = merge(base, models, Average, targets=lambda name, fact: len(fact.shape) == 2)
    assert torch.equal(matrices["out.bias"], base["out.bias"])
    with pytest.raises(ValueError, match="names no tensor"):
        merge(base, models, Average, targets=["nowhere*"])


def test_files_of_every_dtype_and_shape_are_read_by_the_library(tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    dtypes = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    base = {f"w.{i}": torch.randn(3, 5, generator=g).to(d) for i, d in enumerate(dtypes)}
    base |= {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "flag": torch.tensor([True])}
    base |= {"steps": torch.arange(3), "bytes": torch.arange(5, dtype=torch.uint8)}
    model = {n: t + 1 if t.is_floating_point() else t for n, t in base.items()}
    expected = merge(base, [model], Average)
    out = merge(base, [model], Average, out=tmp_path / "out", progress=False)
    found = load_file(out / "model.safetensors")
    assert found.keys() == base.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept_and_the_work_is_done_in_float32_at_least(dtype: torch.dtype) -> None:
    base, models = family(3, dtype)
    merged = merge(base, models, Average)
    assert {one.dtype for one in merged.values()} == {dtype}
    exact = torch.stack([flat(m) for m in models]).mean(dim=0)
    assert torch.equal(flat(merged), exact.to(dtype).double()) or dtype == torch.float64
    assert merge(base, models, Average, dtype=torch.float32)["out.bias"].dtype == torch.float32


def test_a_result_too_large_for_its_dtype_is_refused() -> None:
    base = {"w": torch.zeros(4, dtype=torch.float16)}
    model = {"w": torch.full((4,), 6e4, dtype=torch.float16)}
    with pytest.raises(ValueError, match="'w' of the result is not finite"):
        merge(base, [model], TaskArithmetic(scale=2.0))


def test_modules_and_tied_tensors() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.emb.weight
            self.norm = nn.BatchNorm1d(3)

    base, one, two = Tied(), Tied(), Tied()
    merged = merge(base, [one, two], DARE(drop=0.5))
    assert merged["emb.weight"].data_ptr() == merged["head.weight"].data_ptr()
    base.load_state_dict(merged)
    assert base.head.weight is base.emb.weight
    before = {name: value.clone() for name, value in one.state_dict().items()}
    merge(base, [one, two], TIES)
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path) -> None:
    base, models = family()
    start = folder(tmp_path / "base", base)
    good = folder(tmp_path / "good", models[0])
    out = tmp_path / "out"

    def refused(error: type[Exception], words: str, *args, **options) -> None:
        with pytest.raises(error, match=words):
            merge(*args, out=out, progress=False, **options)
        assert not out.exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    other = {**models[0], "out.bias": torch.zeros(7), "more": torch.zeros(2)}
    del other["emb.weight"]
    refused(ValueError, r"(?s)differ in 3 tensors.*emb\.weight: .*out\.bias: .*more: ",
            start, [good, folder(tmp_path / "other", other)], Average)  # fmt: skip
    half = {name: value.half() for name, value in models[1].items()}
    refused(ValueError, "float16", start, [good, folder(tmp_path / "half", half)], Average)
    refused(ValueError, "is the base itself", start, [good, start], Average)
    copy = folder(tmp_path / "copy", base)
    refused(ValueError, "is the base itself", start, [good, copy], Average)
    refused(ValueError, "3 numbers for 1 models", start, [good], Average, weights=[1, 2, 3])
    refused(ValueError, "finite", start, [good], Average, weights=[float("nan")])
    refused(ValueError, "add up to 0", start, [good, good], Average, weights=[1, -1])
    refused(ValueError, "takes 2 models, not 1", start, [good], Slerp)
    refused(ValueError, "give base", None, [good], TIES)
    refused(ValueError, "models is empty", start, [], Average)
    refused(ValueError, "tokenizer.json is not that",
            start, [folder(tmp_path / "words", models[1], words="a c")], Average)  # fmt: skip
    refused(FileNotFoundError, "no such folder", start, [tmp_path / "nowhere"], Average)
    refused(TypeError, "model 1 is a int", start, [3], Average)
    refused(ValueError, "no rule of merging", start, [good], "lora")
    hurt = {name: value.clone() for name, value in models[1].items()}
    hurt["out.bias"][2] = float("inf")
    for rule in RULES:
        many = [good, folder(tmp_path / f"hurt-{rule.__name__}", hurt)]
        refused(ValueError, r"'out.bias' holds numbers that are not finite", start, many, rule)
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        merge(start, [good], Average, out=out)
    assert list(out.iterdir()) == []


def test_damaged_folders_are_refused_by_name(tmp_path) -> None:
    base, models = family()
    start = folder(tmp_path / "base", base)
    model = folder(tmp_path / "m", models[0], shards=2)
    shard = model / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is damaged"):
        merge(start, [model], Average)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        merge(start, [model], Average)
    shard.write_bytes(whole)
    index = model / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="disagree on 1 tensors: ghost"):
        merge(start, [model], Average)
    told["weight_map"]["ghost"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="outside the folder"):
        merge(start, [model], Average)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="pickles are not read"):
        merge(start, [empty], Average)


def test_the_command_line_merges_and_repeats_a_recipe(tmp_path, capsys) -> None:
    base, models = family(2)
    start = folder(tmp_path / "base", base)
    given = [str(folder(tmp_path / f"m{i}", m)) for i, m in enumerate(models)]
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["merge", "--base", str(start), "--models", *given, "--method", "dare",
             "--set", "drop=0.4", "--weights", "1", "0.5", "--seed", "7"]  # fmt: skip
    assert main([*words, "--out", str(one)]) == 0
    said = capsys.readouterr().out
    assert "merged by the rule" in said
    assert "74 numbers" in said
    expected = merge(base, models, DARE(drop=0.4), weights=[1, 0.5], seed=7)
    assert {n: t.tolist() for n, t in tensors(one).items()} == {
        n: t.tolist() for n, t in expected.items()
    }
    assert main(["merge", "--like", str(one / "merge_recipe.json"), "--out", str(two)]) == 0
    assert (two / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert main([*words, "--out", str(one)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["merge", "--models", given[0], "--out", str(tmp_path / "x")]) == 2
    assert "--method" in capsys.readouterr().err


def test_the_packages_name_is_what_it_does() -> None:
    import toolkit.merge as package

    assert toolkit.merge is package
    assert callable(package)
    assert "merge" in dir(toolkit)


def test_memory_stays_small(tmp_path) -> None:
    """No more than the models' copies of one tensor and a shard are alive at a time."""
    alive: list[int] = []
    base, models = family()

    class Counting(dict):
        def __getitem__(self, name: str) -> Tensor:
            alive.append(1)
            return super().__getitem__(name)

    merge(base, [Counting(m) for m in models], Average)
    assert len(alive) <= 2 * 3 * len(base), "each tensor of each model is read once to merge it"
    assert os.listdir(tmp_path) == []
