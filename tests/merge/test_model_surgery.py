"""Model Surgery: probe, rows, edit, undo, on our gated network and on transformers' forms."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from toolkit import LoRA, ModelSurgery, adapt
from toolkit.core.nets.text import batches
from toolkit.core.seeds import generator
from toolkit.labs.beds.networks import build
from toolkit.labs.merge import model_surgery as lab
from toolkit.labs.merge.manners import arms, language, network
from toolkit.merge.model_surgery import Edit, Probe, gate_rows, masked_mean, mean_states

LLAMA = {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def speaker(seed=0):
    return build(lambda: network.Speaker(8, 3, 12), generator(seed, "test"))


def foreign(name, config, seed=0, **sizes):
    """A tiny random model of transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def llama(seed=0):
    return foreign("LlamaForCausalLM", "LlamaConfig", seed, **LLAMA)


def vector(seed=1, width=8, dtype=torch.float32):
    return torch.randn(width, generator=generator(seed, "v"), dtype=torch.float64).to(dtype)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def brute(state, names, v, k, aligned=False):
    """Name and row of the k extreme cosines, by a sort over plain NumPy numbers."""
    v, found = v.double().numpy(), []
    for name in names:
        for j, w in enumerate(state[name].double().numpy()):
            cosine = float(w @ v / (np.linalg.norm(w) * np.linalg.norm(v)))
            found.append((-cosine if aligned else cosine, name, j))
    return {(name, j) for _, name, j in sorted(found)[:k]}


def pairs(rows):
    return {(name, j) for name, at in rows.items() for j in at.tolist()}


OURS = [f"blocks.{n}.gate.weight" for n in range(3)]
THEIRS = [f"model.layers.{n}.mlp.gate_proj.weight" for n in range(3)]
MODELS = {"ours": (speaker, OURS), "llama": (llama, THEIRS)}


@pytest.fixture(params=MODELS)
def model_and_names(request):
    make, names = MODELS[request.param]
    return make(), names


# which rows


@pytest.mark.parametrize("k", [0, 1, 7, 35, 36])
@pytest.mark.parametrize("side", ["opposed", "aligned"])
def test_selection_is_a_sort_over_all_layers(model_and_names, k, side):
    model, names = model_and_names
    assert list(gate_rows(model)) == names
    rows = ModelSurgery(k=k, side=side).rows(model, vector())
    assert pairs(rows) == brute(model.state_dict(), names, vector(), k, side == "aligned")
    assert all(torch.equal(at, at.sort().values) and len(at) for at in rows.values())


def test_one_pool_and_not_so_many_a_layer():
    model, v = speaker(), vector()
    with torch.no_grad():
        model.blocks[1].gate.weight.copy_(-v + 0.01 * model.blocks[1].gate.weight)
    rows = ModelSurgery(k=12).rows(model, v)
    assert {name: len(at) for name, at in rows.items()} == {OURS[1]: 12}


def test_scaling_of_direction_or_rows_changes_nothing_and_a_minus_takes_the_other_tail():
    model, v = speaker(), vector()
    opposed, aligned = (ModelSurgery(k=9, side=side) for side in ("opposed", "aligned"))
    wanted = pairs(opposed.rows(model, v))
    assert pairs(opposed.rows(model, 1e-20 * v)) == pairs(opposed.rows(model, 1e20 * v)) == wanted
    assert pairs(aligned.rows(model, -v)) == wanted
    assert pairs(opposed.rows(model, -v)) == pairs(aligned.rows(model, v)) != wanted
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.mul_(torch.rand(12, 1, generator=generator(2)) + 0.5)
    assert pairs(opposed.rows(model, v)) == wanted


def test_scores_are_pytorchs_cosines_to_the_bit():
    model, v = llama(), vector()
    for name, cosine in ModelSurgery().scores(model, v).items():
        wanted = F.cosine_similarity(model.state_dict()[name], v.unsqueeze(0), dim=1)
        assert torch.equal(cosine, wanted)


def test_of_equal_cosines_the_earlier_layer_and_row_come_first():
    model = speaker()
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.copy_(torch.ones(12, 8))
    rows = ModelSurgery(k=14).rows(model, torch.ones(8))
    assert pairs(rows) == {(OURS[0], j) for j in range(12)} | {(OURS[1], j) for j in range(2)}


def test_a_share_is_of_all_rows():
    rows = ModelSurgery(share=0.25).rows(speaker(), vector())
    assert len(pairs(rows)) == 9
    assert ModelSurgery(share=1.0).edit(speaker(), vector()).rows.keys() == set(OURS)


def test_a_state_dict_is_read_by_pattern():
    model, v, method = llama(), vector(), ModelSurgery(k=9)
    wanted = pairs(method.rows(model, v))
    assert pairs(method.rows(model.state_dict(), v)) == wanted
    assert pairs(method.rows(model.state_dict(), v, at="*mlp.gate_proj*")) == wanted
    ours = speaker()
    rows = method.rows(ours.state_dict(), v, at="blocks.*.gate.weight")
    assert pairs(rows) == pairs(method.rows(ours, v))
    with pytest.raises(ValueError, match="gate_proj"):
        method.rows(ours.state_dict(), v)
    with pytest.raises(ValueError, match=r"blocks\.0\.gate\.weight"):
        method.rows(ours.state_dict(), v, at="blocks.*.gates.weight")


def test_gate_and_up_in_one_layer_the_gate_is_its_first_half():
    model = foreign("Phi3Model", "Phi3Config", **LLAMA, pad_token_id=0)
    v, method = vector(), ModelSurgery(k=36, alpha=0.5)
    old = snapshot(model)
    held = method.edit(model, v).apply(model)
    for name in (f"layers.{n}.mlp.gate_up_proj.weight" for n in range(3)):
        new = model.state_dict()[name]
        assert torch.equal(new[:12], old[name][:12] + 0.5 * v)
        assert torch.equal(new[12:], old[name][12:])
    held.undo()
    assert same(old, model.state_dict())


def test_layers_that_share_a_weight_move_it_once():
    model, v = speaker(), vector()
    model.blocks[2].gate.weight = model.blocks[0].gate.weight
    assert list(gate_rows(model)) == OURS[:2]
    old = snapshot(model)
    ModelSurgery(k=24, alpha=2.0).edit(model, v).apply(model)
    assert torch.equal(model.blocks[2].gate.weight, old[OURS[2]] + 2 * v)


def test_named_rows_of_an_ungated_network_and_of_conv1d():
    model = foreign("GPT2Model", "GPT2Config", n_embd=8, n_layer=2, n_head=2, vocab_size=19)
    v = vector()
    with pytest.raises(ValueError, match="no gated feed-forward"):
        ModelSurgery(k=3).rows(model, v)
    method, at = ModelSurgery(k=5, alpha=3.0), "h.*.mlp.c_fc"
    names = [f"h.{n}.mlp.c_fc.weight" for n in range(2)]
    turned = {name: model.state_dict()[name].T for name in names}
    edit = method.edit(model, v, at=at)
    assert pairs(edit.rows) == brute(turned, names, v, 5)
    old = snapshot(model)
    with edit.apply(model):
        for name in names:
            moved = (model.state_dict()[name] != old[name]).any(0).nonzero()[:, 0].tolist()
            assert {(name, j) for j in moved} == {p for p in pairs(edit.rows) if p[0] == name}
    assert same(old, model.state_dict())


def test_absorbing_the_norm_compares_rows_times_gain():
    model, v = llama(), vector()
    with torch.no_grad():
        for layer in model.model.layers:
            gain = layer.post_attention_layernorm.weight
            gain.copy_(torch.rand(8, generator=generator(4)) * 3)
    state = model.state_dict()
    gains = {n: state[n.replace("mlp.gate_proj", "post_attention_layernorm")] for n in THEIRS}
    scaled = {name: state[name] * gains[name] for name in THEIRS}
    method = ModelSurgery(k=9, alpha=1.0, absorb_norm=True)
    wanted = brute(scaled, THEIRS, v, 9)
    assert pairs(method.rows(model, v)) == pairs(method.rows(state, v, gains=gains)) == wanted
    assert wanted != pairs(ModelSurgery(k=9).rows(model, v))
    edit = method.edit(model, v)  # the shift itself is v
    name, at = next(iter(edit.rows.items()))
    assert torch.equal(edit.applied(state)[name][at], state[name][at] + v)
    with pytest.raises(ValueError, match="gains"):
        method.rows(state, v)
    with pytest.raises(ValueError, match="gains"):
        method.rows(state, v, gains={THEIRS[0]: gains[THEIRS[0]]})


def test_the_gain_of_gemma_is_stored_less_one():
    model, v = foreign("GemmaModel", "GemmaConfig", **LLAMA, head_dim=4), vector()
    with torch.no_grad():
        for layer in model.layers:
            layer.post_attention_layernorm.weight.uniform_(0, 2)
    state = model.state_dict()
    names = [f"layers.{n}.mlp.gate_proj.weight" for n in range(3)]
    scaled = {n: state[n] * (1 + state[n.replace("mlp.gate_proj", "post_attention_layernorm")])
              for n in names}  # fmt: skip
    found = ModelSurgery(k=9, absorb_norm=True).rows(model, v)
    assert pairs(found) == brute(scaled, names, v, 9)


# the edit


@pytest.mark.parametrize(("k", "alpha"), [(0, 1.0), (9, 0.0)])
def test_nothing_to_do_changes_no_bit(model_and_names, k, alpha):
    model, _ = model_and_names
    old = snapshot(model)
    ModelSurgery(k=k, alpha=alpha).edit(model, vector()).apply(model)
    assert same(old, model.state_dict())


def test_exactly_k_rows_differ_each_by_alpha_v(model_and_names):
    model, _ = model_and_names
    old, v = snapshot(model), vector()
    edit = ModelSurgery(k=9, alpha=1.08).edit(model, v)
    assert same(old, model.state_dict())
    assert len(edit) == 9
    edit.apply(model)
    new = model.state_dict()
    for name, tensor in new.items():
        moved = [] if name not in edit.rows else edit.rows[name].tolist()
        for j in range(len(tensor)):
            wanted = old[name][j] + 1.08 * v if j in moved else old[name][j]
            assert torch.equal(tensor[j], wanted), (name, j)


def test_all_rows_is_an_outer_product_of_ones_and_alpha_v():
    model, v = speaker(), vector()
    old = snapshot(model)
    ModelSurgery(k=36, alpha=-2.0).edit(model, v).apply(model)
    for name in OURS:
        gap = model.state_dict()[name] - old[name]
        torch.testing.assert_close(gap, torch.outer(torch.ones(12), -2.0 * v))


def test_a_state_dict_is_copied_and_gives_what_a_module_gets():
    model, v = llama(), vector()
    state, old = dict(model.state_dict()), snapshot(model)
    edit = ModelSurgery(k=9).edit(state, v)
    new = edit.applied(state)
    assert same(old, state)
    edit.apply(model)
    assert all(torch.equal(new[name], model.state_dict()[name]) for name in edit.rows)
    assert new.keys() == edit.rows.keys()
    delta = edit.delta(old)
    assert len(delta) == 9 * 8
    assert same(delta.applied(old), new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay_and_the_shift_is_rounded_once(dtype):
    model, v = speaker().to(dtype), vector()
    old = snapshot(model)
    edit = ModelSurgery(k=9, alpha=0.3).edit(model, v)
    edit.apply(model)
    name, at = next(iter(edit.rows.items()))
    weight = model.state_dict()[name]
    assert weight.dtype == dtype
    kind = torch.promote_types(dtype, torch.float32)
    wanted = old[name][at].to(kind) + (0.3 * v).to(kind)
    assert torch.equal(weight[at], wanted.to(dtype))


def test_the_gate_shifts_by_alpha_v_h():
    model, v = speaker().double(), vector(dtype=torch.float64)
    edit = ModelSurgery(k=9, alpha=1.5).edit(model, v)
    h = torch.randn(5, 8, generator=generator(3), dtype=torch.float64)
    before = {name: model.get_submodule(name[:-7])(h) for name in OURS}
    edit.apply(model)
    for name in OURS:
        shift = torch.zeros(5, 12, dtype=torch.float64)
        shift[:, edit.rows.get(name, [])] = 1.5 * (h @ v)[:, None]
        torch.testing.assert_close(model.get_submodule(name[:-7])(h) - before[name], shift)


def test_undo_restores_every_bit_and_the_procedure_with_minus_alpha_does_not():
    model, v = speaker(), vector()
    old = snapshot(model)
    method = ModelSurgery(k=9, alpha=3.0)
    edit = method.edit(model, v)
    held = edit.apply(model)
    assert not same(old, model.state_dict())
    again = dataclasses.replace(method, alpha=-3.0).edit(model, v)
    assert pairs(again.rows) != pairs(edit.rows)
    held.undo()
    assert same(old, model.state_dict())
    with pytest.raises(RuntimeError, match="undone already"):
        held.undo()
    with edit.apply(model):
        assert not same(old, model.state_dict())
    assert same(old, model.state_dict())
    edit.apply(model)
    (-edit).apply(model)  # without the old rows: the same list the other way, but for rounding
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, old[name])


def test_two_edits_are_undone_in_order_or_not_at_all():
    model, v = speaker(), vector()
    first = ModelSurgery(k=20).edit(model, v).apply(model)
    middle = snapshot(model)
    second = ModelSurgery(k=20).edit(model, -v).apply(model)
    both = snapshot(model)
    with pytest.raises(RuntimeError, match="later edits first"):
        first.undo()
    assert same(both, model.state_dict())
    second.undo()
    assert same(middle, model.state_dict())
    first.undo()


def test_an_edit_is_filed_whole_and_names_its_base(tmp_path):
    model, v, path = llama(), vector(), tmp_path / "calm.safetensors"
    edit = ModelSurgery(k=9, alpha=1.08).edit(model, v)
    edit.save(path)
    assert path.stat().st_size < 4000
    again = Edit.load(path)
    assert again.alpha == 1.08
    assert again.bases == edit.bases
    assert again.rows.keys() == edit.rows.keys()
    old = snapshot(model)
    wanted = edit.applied(old)
    with again.apply(model):
        assert same(wanted, model.state_dict())
    other = llama(1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=next(iter(edit.bases.values()))):
        again.apply(other)
    with pytest.raises(ValueError, match="hash"):
        again.applied(before)
    with pytest.raises(ValueError, match="no plain tensor"):
        again.apply(speaker())
    with pytest.raises(ValueError, match="no tensor"):
        again.applied(speaker().state_dict())
    assert same(before, other.state_dict())
    dataclasses.replace(again, bases={}).apply(other)
    assert not same(before, other.state_dict())


def test_damaged_files_are_refused(tmp_path):
    edit, path = ModelSurgery(k=9).edit(speaker(), vector()), tmp_path / "edit.safetensors"
    with pytest.raises(FileNotFoundError):
        Edit.load(path)
    edit.save(path)
    data, tensors = path.read_bytes(), load_file(path)
    for part in (data[: len(data) // 2], b"", b"\x80\x04pickle" * 9):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="no edit of rows"):
            Edit.load(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="format"):
        Edit.load(path)
    from safetensors import safe_open

    path.write_bytes(data)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    for name, bad in (
        ("direction", torch.full((8,), float("nan"))),
        (next(n for n in tensors if n != "direction"), torch.tensor([3, 1], dtype=torch.int32)),
    ):
        save_file(tensors | {name: bad}, path, metadata=facts)
        with pytest.raises(ValueError, match="damaged"):
            Edit.load(path)


# what is refused


def test_bad_input_is_refused_and_nothing_changes():
    model, v = speaker(), vector()
    old = snapshot(model)
    for bad, words in (
        (torch.zeros(8), "direction is zero"),
        (v * float("nan"), "not finite"),
        (vector(width=9), "direction has 9 numbers"),
        (v[None], "one row"),
        (torch.ones(8, dtype=torch.int64), "one row"),
    ):
        with pytest.raises(ValueError, match=words):
            ModelSurgery(k=3).edit(model, bad)
    with pytest.raises(ValueError, match="36 gate rows"):
        ModelSurgery(k=37).rows(model, v)
    with pytest.raises(ValueError, match="36 gate rows"):
        ModelSurgery().rows(model, v)
    with pytest.raises(ValueError, match="at: no layer"):
        ModelSurgery(k=3).rows(model, v, at="*.gates")
    with pytest.raises(ValueError, match="holds no block"):
        ModelSurgery(k=3).rows(nn.Sequential(nn.Linear(8, 8)), v)
    for wrong in ({"k": -1}, {"k": 1.5}, {"alpha": float("inf")}, {"side": "both"}, {"share": 2.0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            ModelSurgery(**wrong)
    with pytest.raises(TypeError, match="direction is a list"):
        ModelSurgery(k=3).rows(model, v.tolist())
    with pytest.raises(TypeError, match="model is a list"):
        ModelSurgery(k=3).rows([model], v)
    with pytest.raises(TypeError, match=r"applied\(\)"):
        ModelSurgery(k=3).edit(model, v).apply(model.state_dict())
    narrow = dataclasses.replace(ModelSurgery(k=3, alpha=1e6).edit(model, v), bases={})
    with pytest.raises(ValueError, match="not be finite"):
        narrow.apply(speaker().half())
    assert same(old, model.state_dict())


def test_a_weight_that_is_not_plain_is_refused_by_name():
    v = vector()
    adapted = adapt(speaker(), LoRA(rank=2), targets="*.gate")
    with pytest.raises(TypeError, match=r"blocks\.0\.gate .*merge"):
        ModelSurgery(k=3).rows(adapted.model, v)
    assert len(pairs(ModelSurgery(k=3).rows(adapted.merge(), v))) == 3
    model = speaker()
    nn.utils.parametrizations.weight_norm(model.blocks[1].gate)
    with pytest.raises(TypeError, match=r"blocks\.1\.gate"):
        ModelSurgery(k=3).rows(model, v)
    state = dict(llama().state_dict())
    state[THEIRS[1]] = torch.zeros(12, 8, dtype=torch.int8)
    with pytest.raises(TypeError, match="unquantised"):
        ModelSurgery(k=3).rows(state, v)


# the probe


def test_masked_mean_leaves_padding_out_and_not_token_zero():
    hidden = torch.randn(3, 4, 5, generator=generator(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    found = masked_mean(hidden, mask)
    counts = mask.sum(1, keepdim=True).float()
    wanted = (hidden * mask[..., None].float()).sum(1) / (counts + 1e-10)
    assert torch.equal(found, wanted)
    longer = torch.cat([hidden, torch.full((3, 2, 5), float("nan"))], 1)
    assert torch.equal(masked_mean(longer, F.pad(mask, (0, 2))), found)
    assert masked_mean(hidden.half(), mask).dtype == torch.float32
    assert masked_mean(hidden.double(), mask).dtype == torch.float64
    for bad in (mask[:, :3], mask * 2):
        with pytest.raises(ValueError, match="mask"):
            masked_mean(hidden, bad)


def test_mean_states_of_padded_batches_are_those_of_each_text_alone():
    model = llama()
    sentences = [[3, 0, 5], [7, 2, 0, 1, 4], [0]]
    padded = mean_states(model, [batches(sentences, batch_size=3)[0]])
    order = batches(sentences, batch_size=3)[0].index
    for place, number in enumerate(order.tolist()):
        ids = torch.tensor([sentences[number]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(padded[place], hidden[0].mean(0))
    ids, mask = torch.tensor([[3, 1], [4, 0]]), torch.tensor([[1, 1], [1, 0]])
    last = mean_states(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(last, mean_states(model, [(ids, mask)], at="model.norm"))
    ours = speaker().train()
    assert mean_states(ours, [(ids, mask)], at="norm").shape == (2, 8)
    assert ours.training
    assert not ours.norm._forward_hooks
    with pytest.raises(ValueError, match="attention_mask is None"):
        mean_states(model, [(ids, None)])
    with pytest.raises(ValueError, match="no module 'last'"):
        mean_states(model, [(ids, mask)], at="last")


def by_hand(states, labels, start, orders, rate, batch):
    """Softmax regression by Adam in NumPy."""
    W, b = (t.double().numpy().copy() for t in start)
    x, y = states.double().numpy(), labels.numpy()
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in (W, b)]
    step = 0
    for order in orders.numpy():
        for first in range(0, len(order), batch):
            at = order[first : first + batch]
            score = x[at] @ W.T + b
            share = np.exp(score - score.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
            share[np.arange(len(at)), y[at]] -= 1
            step += 1
            slopes = share.T @ x[at] / len(at), share.mean(0)
            for p, g, (m, s) in zip((W, b), slopes, moments, strict=True):
                m *= 0.9
                m += 0.1 * g
                s *= 0.999
                s += 0.001 * g * g
                p -= rate * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + 1e-8)
    return W, b


def separable(n=60, width=6):
    draws = generator(5, "separable")
    labels = torch.arange(n) % 2
    states = torch.randn(n, width, generator=draws) * 0.3
    states[:, 0] += 2.0 * labels - 1
    return states, labels


def test_fit_is_softmax_regression_by_adam_with_given_draws():
    states, labels = separable(20)
    start = torch.randn(2, 6, generator=generator(1)), torch.randn(2, generator=generator(2))
    orders = torch.stack([torch.randperm(20, generator=generator(k)) for k in range(4)])
    probe = Probe.fit(states.double(), labels, rate=0.01, epochs=4, batch=8, start=start,
                      orders=orders)  # fmt: skip
    W, b = by_hand(states, labels, start, orders, 0.01, 8)
    np.testing.assert_allclose(probe.weight.numpy(), W, rtol=1e-6)
    np.testing.assert_allclose(probe.bias.numpy(), b, rtol=1e-6)
    assert torch.equal(probe.direction(), probe.weight[1])
    assert torch.equal(probe.direction(bad=0), probe.weight[0])


def test_a_separable_set_is_learned_whole_and_draws_repeat():
    states, labels = separable()
    fits = [Probe.fit(states, labels, rate=0.05, epochs=30, generator=generator(0)) for _ in "ab"]
    assert fits[0].accuracy(states, labels) == 1.0
    assert torch.equal(fits[0].weight, fits[1].weight)
    assert fits[0].weight.dtype == torch.float32
    slow = Probe.fit(states, labels, generator=generator(0))
    assert float((slow.weight - Probe.fit(states, labels, rate=1e-9, generator=generator(0))
                  .weight).abs().max()) <= 20 * 2 * 1e-4 + 1e-6  # fmt: skip


def test_the_probe_refuses_what_it_cannot_learn_from():
    states, labels = separable()
    draws = generator(0)
    for given, words in (
        ((states, torch.ones(60, dtype=torch.int64)), "labels are all 1"),
        ((states, labels[:59]), "labels have shape"),
        ((states, labels.float()), "labels hold"),
        ((states, labels - 1), "labels hold -1"),
        ((states * float("nan"), labels), "states hold NaN"),
        ((states[0], labels), "states: shape"),
    ):
        with pytest.raises(ValueError, match=words):
            Probe.fit(*given, generator=draws)
    with pytest.raises(ValueError, match="generator"):
        Probe.fit(states, labels)
    with pytest.raises(ValueError, match="orders"):
        Probe.fit(states, labels, epochs=1, generator=draws, orders=[[0] * 60])
    with pytest.raises(ValueError, match="start"):
        Probe.fit(states, labels, generator=draws, start=(torch.zeros(2, 5), torch.zeros(2)))
    with pytest.raises(ValueError, match="rate"):
        Probe.fit(states, labels, generator=draws, rate=0.0)


def test_strength_means_the_same_for_every_scale():
    model, v = speaker(), vector()
    alpha = ModelSurgery().alpha_for(model, v, 2.0)
    lengths = torch.cat([rows.norm(dim=1) for rows in gate_rows(model).values()])
    assert alpha * v.norm() / lengths.mean() == pytest.approx(2.0)
    assert ModelSurgery().alpha_for(model, 10 * v, 2.0) == pytest.approx(alpha / 10)


# the lab


def test_the_language_keeps_its_promises():
    spoken = language.language(3)
    rows = language.texts(spoken, 400, generator(0, "a"), "say", 1)
    rude, polite = (torch.isin(rows, language.MARKERS[style]).sum().item() for style in (1, 0))
    assert rude + polite == 400 * 6
    assert 0 < polite < 0.06 * 2400
    assert (rows[:, [7, 15]] == language.STOP).all()
    notes = language.texts(spoken, 50, generator(0, "b"), "note")
    assert not torch.isin(notes, language.MARKERS).any()
    told = language.texts(spoken, 50, generator(0, "c"), "fact")
    at = language.answers(told).nonzero()
    assert len(at) == 200
    for row, place in at.tolist():
        key, relation = told[row, place - 2] - 43, told[row, place - 1] - 75
        assert told[row, place] == language.VALUES[spoken.facts[key, relation]]
    assert not torch.equal(language.language(4).facts, spoken.facts)


def test_what_follows_is_drawn_from_the_model_by_given_numbers():
    model = speaker()
    prompts = torch.tensor([[1, 2, 3], [4, 5, 6]])
    uniform = torch.tensor([[0.0, 0.5], [1.0 - 1e-7, 0.2]])
    said = network.continued(model, prompts, uniform)
    share = model(prompts)[:, -1].softmax(-1)
    for row in range(2):
        below = share[row, : said[row, 0]].sum()
        assert below <= uniform[row, 0] + 1e-6
        assert uniform[row, 0] <= below + share[row, said[row, 0]] + 1e-6


def test_arms_leave_the_network_as_it_was_and_draw_as_many_rows():
    this = arms.study(0, "ci")
    before = snapshot(this.model)
    told = network.judges(this.spoken, 0, "ci", "validation")
    plain = network.manners(this.model, told)
    for arm in (*arms.EDITS, "steering"):
        ways = arms.altered(this, arm, 0, "ci")
        assert len(ways) == 4
        with ways[3]() as altered:
            assert network.manners(altered, told) != plain, arm
        assert network.manners(this.model, told) == plain
    assert len(arms.trained(this, "lora", 1e-2, 0, "ci")) == 4
    assert same(before, this.model.state_dict())
    published, random = (arms.surgery(this, arm, 0.1, 2.0, 0) for arm in
                         ("published", "random rows"))  # fmt: skip
    assert len(published) == len(random) == 6
    assert pairs(published.rows) != pairs(random.rows)
    assert pairs(random.rows) < pairs(arms.surgery(this, "random rows", 0.4, 2.0, 0).rows)
    norms = [v.norm() for v in this.directions.values()]
    torch.testing.assert_close(norms[0].expand(3), torch.stack(norms))


def test_the_strength_is_chosen_within_the_budget_or_none_is():
    model, told = speaker(), None
    outcomes = [
        {"rude": 30.0, "polite": 1.0, "neutral": 2.02}, {"rude": 10.0, "polite": 1.0,
                                                          "neutral": 2.06},
        {"rude": 20.0, "polite": 1.0, "neutral": 2.049},
    ]  # fmt: skip
    before = {"rude": 40.0, "polite": 0.0, "neutral": 2.0}
    ways = [lambda: contextlib.nullcontext(model)] * 3
    with mock.patch.object(arms, "manners", side_effect=outcomes):
        assert arms.validated(ways, before, told).chosen == 2
    with mock.patch.object(arms, "manners", return_value={**before, "rude": 41.0}):
        assert arms.validated(ways, before, told).chosen == -1


def test_a_job_repeats_and_tells_all_arms():
    short = lab.tuning_run("lora", 4e-3, 0, "ci")
    torch.rand(3)
    network._base.cache_clear()
    assert lab.tuning_run("lora", 4e-3, 0, "ci") == short
    first = lab.operation(0, "ci", 1e-3, 4e-3)
    for arm in arms.ARMS:
        assert len(first[f"{arm}: rudes"]) == 4
        assert 0 <= first[f"{arm}: rude"] <= 100
    assert sum(first["cosines"]) == 2 * 32
    assert sum(first["layers"]) == round(0.2 * 64)
