"""The shared networks: their shapes, their randomness, and how text becomes batches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from toolkit.core import data, nets

BUILDERS = {
    "mlp": (lambda **options: nets.mlp((64, 20, 10), **options), (3, 64)),
    "convnet": (lambda **options: nets.convnet(channels=(4, 6), **options), (3, 1, 8, 8)),
    "digits_transformer": (
        lambda **options: nets.digits_transformer(width=16, depth=2, **options),
        (3, 8, 8),
    ),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=BUILDERS)
def builder(request):
    return BUILDERS[request.param]


def test_a_generator_decides_every_weight_and_nothing_else_is_drawn(builder):
    make, _ = builder
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = (make(generator=seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    make()  # without a generator PyTorch's global one is used
    assert not torch.equal(torch.get_rng_state(), before)


def test_every_number_is_initialised_and_every_parameter_trains(builder):
    make, shape = builder
    network = make(generator=seeded())
    for name, tensor in network.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.device.type == "cpu", name
    network(torch.randn(shape, generator=seeded())).square().sum().backward()
    for name, parameter in network.named_parameters():
        # The bias of a key shifts all scores of a query alike, so softmax cancels it.
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().max() > 0, name


def test_scores_have_one_column_per_class(builder):
    make, shape = builder
    network = make(generator=seeded(), dtype=torch.float64)
    scores = network(torch.randn(shape, generator=seeded(), dtype=torch.float64))
    assert (scores.shape, scores.dtype) == ((3, 10), torch.float64)


def test_mlp_weights_have_the_variance_that_relu_needs():
    network = nets.mlp((400, 500, 300), generator=seeded())
    assert [type(part) for part in network] == [nn.Linear, nn.ReLU, nn.Linear]
    assert network[0].weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert network[2].weight.std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02)
    assert not network[0].bias.any()


def test_initialise_matches_the_bounds_of_pytorch_and_refuses_strangers():
    layer = nets.initialise(nn.Conv2d(6, 40, 5), seeded())
    bound = 1 / (6 * 25) ** 0.5
    assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert layer.bias.abs().max() <= bound

    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(TypeError, match="cannot initialise Stranger; give it reset"):
        nets.initialise(nn.Sequential(nn.Linear(2, 2), Stranger()))


def test_transformer_patches_are_the_squares_of_the_image():
    network = nets.digits_transformer(width=4, depth=1, heads=1, generator=seeded())
    seen = []
    network.embed.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    image = torch.arange(64.0).reshape(1, 8, 8)
    flat, channelled = network(image), network(image.unsqueeze(1))
    assert torch.equal(flat, channelled)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]  # second row, second column of patches


def test_transformer_attention_is_the_textbook_formula():
    block = nets.digits_transformer(width=8, depth=1, heads=2, generator=seeded()).blocks[0]
    attention, x = block.attention, torch.randn(2, 5, 8, generator=seeded())
    mixed = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (f(x)[..., part] for f in (attention.query, attention.key, attention.value))
        mixed.append((q @ k.mT / 2).softmax(-1) @ v)
    torch.testing.assert_close(attention(x), attention.output(torch.cat(mixed, -1)))


def test_the_small_networks_learn_the_digits():
    digits = data.load("digits")
    x, y = torch.from_numpy(digits.x_train[:600]), torch.from_numpy(digits.y_train[:600])
    for network, images in (
        (nets.convnet(channels=(8, 16), generator=seeded()), x.unsqueeze(1)),
        (nets.digits_transformer(width=16, depth=1, generator=seeded()), x),
        (nets.mlp((64, 32, 10), generator=seeded()), x.flatten(1)),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), y).backward()
            optimizer.step()
        assert (network(images).argmax(1) == y).float().mean() > 0.8, type(network)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nets.mlp((4,)), "widths: need at least input and output"),
        (lambda: nets.mlp((4, 0, 2)), r"widths: every size must be at least 1, got \(4, 0, 2\)"),
        (lambda: nets.convnet(channels=()), "channels: need at least one block"),
        (lambda: nets.convnet(classes=0), "classes: every size must be at least 1"),
        (lambda: nets.digits_transformer(width=10, heads=4), "heads: 4 does not divide the width"),
        (lambda: nets.digits_transformer(patch=3), "patch: patches of 3 do not tile"),
        (lambda: nets.TextClassifier(nn.Identity(), 2), "width: the encoder has no config"),
        (lambda: nets.TextClassifier(nn.Identity(), 0, width=3), "classes: must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class Encoder(nn.Module):
    """Token vectors from a table; what padding holds would show in a careless mean."""

    def __init__(self, tensor_out):
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.config, self.tensor_out = SimpleNamespace(hidden_size=6), tensor_out

    def forward(self, input_ids, attention_mask):
        tokens = self.table(input_ids)
        return tokens if self.tensor_out else SimpleNamespace(last_hidden_state=tokens)


@pytest.mark.parametrize("tensor_out", [True, False])
def test_the_text_classifier_averages_tokens_without_padding(tensor_out):
    encoder = Encoder(tensor_out)
    classifier = nets.TextClassifier(encoder, 3, generator=seeded())
    ids = torch.tensor([[4, 9, 2, 0], [7, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    rows = encoder.table.weight
    means = torch.stack([(rows[4] + rows[9] + rows[2]) / 3, rows[7]])
    torch.testing.assert_close(classifier.embed(ids, mask), means)
    torch.testing.assert_close(classifier(ids, mask), classifier.head(means))
    same = nets.TextClassifier(encoder, 3, generator=seeded())
    assert torch.equal(classifier.head.weight, same.head.weight)
    assert nets.TextClassifier(encoder.double(), 3).head.weight.dtype == torch.float64


class Words:
    """A tokenizer that numbers words by their length."""

    pad_token_id = 49

    def __call__(self, sentences, truncation, max_length):
        assert truncation
        return {"input_ids": [[len(w) for w in s.split()][:max_length] for s in sentences]}


def sentences(count):
    lengths = torch.randint(1, 30, (count,), generator=seeded(9)).tolist()
    return [" ".join("a" * (1 + (place + word) % 7) for word in range(length))
            for place, length in enumerate(lengths)]  # fmt: skip


@pytest.mark.parametrize("seed", [None, 4])
def test_batches_hold_every_sentence_once_and_pad_little(seed):
    texts = sentences(1000)
    labels = [place % 5 for place in range(1000)]
    generator = None if seed is None else seeded(seed)
    made = nets.encode_batches(Words(), texts, labels, 16, 24, generator)
    tokens = nets.encode(Words(), texts, 24)
    assert sorted(torch.cat([batch.index for batch in made]).tolist()) == list(range(1000))
    for batch in made:
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1]
        for row, place in enumerate(batch.index.tolist()):
            kept = batch.attention_mask[row].bool()
            assert batch.input_ids[row][kept].tolist() == tokens[place]
            assert (batch.input_ids[row][~kept] == 49).all()
            assert batch.labels[row] == labels[place]
    padding = 1 - sum(b.attention_mask.sum() for b in made) / sum(b.input_ids.numel() for b in made)
    assert padding < 0.05


def test_batches_follow_their_generator():
    tokens = nets.encode(Words(), sentences(300))

    def order(generator):
        return torch.cat([b.index for b in nets.batches(tokens, None, 8, generator)]).tolist()

    assert order(seeded(1)) == order(seeded(1))
    assert order(seeded(1)) != order(seeded(2))
    one = seeded(1)
    assert order(one) != order(one)  # the next epoch is another one
    assert order(None) == order(None)
    assert nets.batches(tokens)[0].labels is None


def test_batches_move_between_devices_as_a_whole():
    batch = nets.batches([[1, 2], [3]], [0, 1])[0].to("meta")
    assert {item.device.type for item in batch} == {"meta"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nets.encode(Words(), []), "sentences: there is none"),
        (lambda: nets.encode(Words(), ["a"], 0), "max_length: must be at least 1"),
        (lambda: nets.batches([[1]], [0, 1]), "labels: 2 for 1 sentences"),
        (lambda: nets.batches([[1]], batch_size=0), "batch_size: must be at least 1"),
    ],
)
def test_impossible_batches_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
