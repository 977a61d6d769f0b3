"""The residual MLP and the transformer whose lanes train as one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from toolkit.core import nets
from toolkit.core.lanes import Lane, LaneNet, train
from toolkit.core.nets import residual as stream

MAKERS = {
    "mlp": (lambda g=None: stream.residual_mlp(20, 16, 3, 10, g), (3, 20)),
    "transformer": (
        lambda g=None: stream.stream_transformer(16, 2, 4, 10, 2, (4, 10), g),
        (3, 4, 10),
    ),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MAKERS)
def test_the_generator_decides_and_the_global_one_is_left_alone(name):
    make, shape = MAKERS[name]
    before = torch.get_rng_state()
    one, same, other = make(seeded()), make(seeded()), make(seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(shape, generator=seeded(2))
    assert one(x).shape == (3, 10)
    assert torch.equal(one(x), same(x))
    assert not torch.allclose(one(x), other(x))


def test_the_residual_mlp_is_its_formula():
    network = stream.residual_mlp(30, 20, 2, 5, seeded()).double()
    x = torch.randn(4, 5, 6, generator=seeded(), dtype=torch.float64)
    line = x.flatten(1) @ network.stem.weight.T + network.stem.bias

    def normed(values):
        centred = values - values.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()

    for block in network.blocks:
        line = line + (normed(line) @ block.linear.weight.T + block.linear.bias).clamp(min=0)
    expected = normed(line) @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(x), expected)
    assert len(network.blocks) == 2
    assert network.stem.weight.abs().max() <= 1 / math.sqrt(30)


def test_the_patches_of_a_wide_image_are_read_row_by_row():
    network = stream.stream_transformer(4, 1, 1, 3, patch=2, size=(4, 10), generator=seeded())
    assert network.position.weight.shape == (2 * 5, 4)
    seen = []
    network.embed.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    image = torch.arange(40.0).reshape(1, 4, 10)
    assert torch.equal(network(image), network(image.unsqueeze(1)))
    assert seen[0][0, 4].tolist() == [8, 9, 18, 19]  # the last patch of the first row
    assert seen[0][0, 6].tolist() == [22, 23, 32, 33]  # the second row, the second column


def test_it_is_the_transformer_of_the_other_chapters():
    ours = stream.stream_transformer(8, 2, 2, 3, patch=2, size=(8, 8), generator=seeded())
    theirs = nets.digits_transformer(8, 2, 2, 3, generator=seeded(1))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 8, 8, generator=seeded(2))
    torch.testing.assert_close(ours(x), theirs(x))
    block, tokens = ours.blocks[0], torch.randn(2, 6, 8, generator=seeded(3))
    middle = block.attend(tokens)
    torch.testing.assert_close(middle, tokens + block.attention(block.norm1(tokens)))
    expected = middle + block.down(F.gelu(block.up(block.norm2(middle))))
    torch.testing.assert_close(block.feed(middle), expected)
    torch.testing.assert_close(block(tokens), expected)


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize("name", MAKERS)
def test_lanes_call_it_without_a_loop_over_lanes(name):
    make, shape = MAKERS[name]
    x = torch.randn(8, *shape[1:], generator=seeded())
    y = torch.randint(10, (8,), generator=seeded())
    done = train(make, [Lane(seed=s, steps=2, batch=4) for s in (0, 1)], x, y)
    logits = LaneNet(make()).predict(done.states, x)
    for m in (0, 1):
        network = make()
        network.load_state_dict({n: t[m] for n, t in done.states.items()})
        torch.testing.assert_close(logits[m], network(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: stream.residual_mlp(4, 0, 2, 3), "must be at least 1"),
        (lambda: stream.stream_transformer(10, heads=4), "out of range"),
        (lambda: stream.stream_transformer(depth=0), "out of range"),
        (lambda: stream.stream_transformer(size=(28, 50)), "do not tile an image"),
        (lambda: stream.stream_transformer(size=(28, 0)), "out of range"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()
