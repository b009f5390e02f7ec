"""Training computes what serving computes, and its short cuts change nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.torch,
    pytest.mark.full,
    # The libraries name their own outdated words while they load.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

torch = pytest.importorskip("torch")

from diffusers import Flux2KleinPipeline  # noqa: E402 - after the check for torch
from safetensors.torch import load_file  # noqa: E402

from app.engine.models.shapes import SHAPES  # noqa: E402
from tools.shapes import attributes, linear_start, nets  # noqa: E402
from tools.shapes.checkpoint import go_on  # noqa: E402
from tools.shapes.codec import ordinary_images  # noqa: E402
from tools.shapes.draw import render, tensors  # noqa: E402
from tools.shapes.feed import Order, Packers, pack  # noqa: E402
from tools.shapes.fitting import FlatWeights, Stepper  # noqa: E402
from tools.shapes.flow import SHIFT, Trainer, sample_levels  # noqa: E402
from tools.shapes.passes import Operations, text_features, velocity  # noqa: E402
from tools.shapes.scenes import Scene, Thing, lay_out  # noqa: E402
from tools.shapes.shelves import (  # noqa: E402
    BACKGROUND,
    CHANGED,
    EDIT_PLANS,
    KEPT,
    PADDING,
    PLANS,
    SMALL_EDIT_PLANS,
    SMALL_PLANS,
    Shelves,
    roles_of,
)
from tools.shapes.vocabulary import SEQUENCE_LENGTH, PromptCodes, build_tokenizer  # noqa: E402

PROMPTS = ["a red circle", "a blue square left of a pink star on a green background"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(prompts=1000)


@pytest.fixture(scope="module")
def codes(tokenizer, tmp_path_factory):
    place: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(place)
    return PromptCodes(place / "tokenizer.json")


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return nets.build_text_encoder().eval()


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = nets.build_transformer().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@torch.no_grad()
def test_text_features(text, tokenizer, codes):
    """The training pass over a prompt gives the pipeline's prompt embeddings."""
    ours = text_features(text, codes.rows(PROMPTS), codes.pad, nets.text_rotary(text))
    theirs = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        text, tokenizer, PROMPTS, max_sequence_length=SEQUENCE_LENGTH
    )

    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_velocity(transformer):
    """The training pass over tokens and a reference gives the transformer's own answer."""
    words, tokens = torch.randn(2, SEQUENCE_LENGTH, 192), torch.randn(2, 24, 64)
    level = torch.tensor([0.3, 0.9])
    grid = torch.zeros(1, 64, 3, 4)
    ids = (
        Flux2KleinPipeline._prepare_latent_ids(grid),
        Flux2KleinPipeline._prepare_image_ids([grid]),
    )
    theirs = transformer(
        hidden_states=tokens,
        encoder_hidden_states=words,
        timestep=level,
        img_ids=torch.cat(ids, dim=1),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(words),
    ).sample

    rotary = nets.rotary_for(transformer, 3, 4, references=1)
    ours = velocity(transformer, tokens, text=words, level=level, rotary=rotary)

    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_padding(transformer):
    """Masked padding after the tokens changes nothing for the real ones."""
    words, tokens = torch.randn(1, SEQUENCE_LENGTH, 192), torch.randn(1, 12, 64)
    level, rotary = torch.tensor([0.7]), nets.rotary_for(transformer, 3, 4)
    padded = torch.cat((tokens, torch.randn(1, 4, 64)), dim=1)
    longer = nets.Rotary(*(torch.cat((part, part[:4])) for part in rotary))
    mask = torch.arange(SEQUENCE_LENGTH + 16) < SEQUENCE_LENGTH + 12

    plain = velocity(transformer, tokens, text=words, level=level, rotary=rotary)
    ours = velocity(transformer, padded, text=words, level=level, rotary=longer, mask=mask)

    torch.testing.assert_close(ours[:, :12], plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_latents():
    """Encoded tokens are what the pipeline makes of a reference, and they decode in place."""
    torch.manual_seed(0)
    codec = nets.build_codec().eval()
    codec.bn.running_mean.normal_()
    codec.bn.running_var.uniform_(0.5, 2)
    images = torch.rand(1, 3, 48, 64)

    tokens = nets.encode_tokens(codec, images)
    theirs = Flux2KleinPipeline._pack_latents(
        Flux2KleinPipeline._encode_vae_image(_Holder(codec), images * 2 - 1, None)
    )

    torch.testing.assert_close(tokens, theirs)
    assert nets.decode_tokens(codec, tokens, 3, 4).shape == images.shape


class _Holder:
    """As much of a pipeline as encoding an image needs."""

    _patchify_latents = staticmethod(Flux2KleinPipeline._patchify_latents)

    def __init__(self, vae):
        self.vae = vae


def test_flat_adamw():
    """The flat optimiser takes AdamW's steps, clipping and decay as torch takes them."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    theirs.load_state_dict(ours.state_dict())
    groups = [
        {"params": [theirs.weight], "weight_decay": 0.01},
        {"params": [theirs.bias], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), eps=1e-8)
    flat = FlatWeights(ours.parameters(), torch.device("cpu"), torch.float32)
    flat.rate.fill_(0.01)
    stepper = Stepper(flat, lambda batch: _loss(ours, batch))

    for _ in range(5):
        batch = {"x": torch.randn(4, 8) * 3}
        stepper.step(batch)
        adamw.zero_grad()
        _loss(theirs, batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()

    torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-4, rtol=1e-3)


def _loss(linear, batch):
    loss = linear(batch["x"]).square().mean()
    return loss, loss.reshape(1)


def test_average():
    """The average stands in for the weights for a while, and in the end for good."""
    linear = torch.nn.Linear(2, 2)
    flat = FlatWeights(linear.parameters(), torch.device("cpu"), torch.float32)
    flat.average.fill_(0.25)
    before = linear.weight.clone()

    with flat.averaged():
        assert linear.weight.eq(0.25).all()
    assert linear.weight.equal(before)
    flat.settle()
    assert linear.weight.eq(0.25).all()


def test_levels():
    """Noise levels cover the whole way, half of them where four steps stop."""
    torch.manual_seed(0)
    levels = sample_levels(20_000, torch.device("cpu"))
    stops = [SHIFT * left / (1 + (SHIFT - 1) * left) for left in (1.0, 0.75, 0.5, 0.25)]

    assert levels.min() > 0
    assert levels.max() == 1
    assert (levels == 1).float().mean() > 0.35
    for stop in stops:
        assert ((levels - stop).abs() < 0.02).float().mean() > 0.05


def test_going_on_from_a_finished_checkpoint(codes):
    """Training starts from the weights on board: all of them that are trained."""
    text, place = nets.build_text_encoder(), SHAPES.folder
    trainer = Trainer(
        text,
        nets.build_transformer(),
        nets.build_codec(),
        Packers(codes.source, workers=0),
        pad=codes.pad,
        by=Operations(),
        device=torch.device("cpu"),
        prompt_rotary=nets.text_rotary(text),
        shrink=64,
    )
    go_on(trainer, place)
    trained = {id(parameter) for parameter in trainer.weights.parameters}
    count = 0
    for network, name in (
        (trainer.text, "text_encoder/model.safetensors"),
        (trainer.transformer, "transformer/diffusion_pytorch_model.safetensors"),
    ):
        stored = load_file(place / name)
        for own, parameter in network.named_parameters():
            if id(parameter) in trained:
                assert torch.equal(parameter.float(), stored[own].float()), own
                count += 1

    assert count > 27 * 11


def test_crates(codes):
    """The same order always gives the same crate, whoever packs it, and its prompts fit."""
    order = Order(8, 12, 6, seed=3, is_edit=True)
    packers = Packers(codes.source, workers=0)
    packers.ask(order)
    first, second = pack(order, codes), packers.take()

    assert (first.ids == second.ids).all()
    assert (first.marks == second.marks).all()
    assert first.marks.shape == (6, 2, 2, 7)
    assert first.ids.shape == (6, 2, SEQUENCE_LENGTH)
    assert first.labels.shape == (6, 2, len(attributes.CLASSES))


@pytest.mark.parametrize("number", range(len(PLANS + SMALL_PLANS)))
def test_shelf(number, codes, transformer):
    """Every size of a shelf gives batches of one shape, padded and masked to its capacity."""
    plans = PLANS + SMALL_PLANS
    plan = plans[number]
    packers, device = Packers(codes.source, workers=0), torch.device("cpu")
    shelves = Shelves(packers, nets.build_codec().eval(), transformer, device, 512, plans)
    shelf = shelves.each[number]
    pictures = 1 + plan.is_edit
    sizes = {min(plan.sizes), max(plan.sizes, key=lambda size: size[0] * size[1])}
    for rows, columns in sizes | ({(16, 16)} & set(plan.sizes)):
        packers.ask(Order(rows, columns, 2, seed=1, is_edit=plan.is_edit))
        shelf.put(shelves._loaded(packers.take(), plan.capacity))
        batch = shelf.batch_of(random.Random(0))

        assert batch["clean"].shape == (2, plan.capacity, 64)
        assert batch["weights"].shape == (2, plan.capacity)
        assert batch["cos"].shape == (SEQUENCE_LENGTH + pictures * plan.capacity, 32)
        assert ("reference" in batch) == plan.is_edit
        if plan.is_edit:
            assert (batch["roles"] == PADDING).sum() == 2 * (plan.capacity - rows * columns)
        if "mask" in batch:
            assert batch["mask"].sum() == SEQUENCE_LENGTH + pictures * rows * columns
        else:
            assert rows * columns == plan.capacity
        shelf._goods.clear()


def test_roles():
    """A reference's tokens know the thing that an edit changes from the one that it keeps."""
    pair = (Thing("circle", "red", place="left"), Thing("square", "blue", place="right"))
    green = (Thing("circle", "green", place="left"), pair[1])
    befores, afters = (Scene(pair), Scene(pair)), (Scene(green), Scene(pair, "gray"))
    scenes = [[lay_out(scene, 256, 256) for scene in part] for part in (befores, afters)]
    marks = torch.stack([tensors(part)[0] for part in scenes], dim=1)
    _, coverage = render(marks[:, 0], torch.ones(2, 3), 256, 256)
    recoloured, on_gray = roles_of(coverage, marks).view(2, 16, 16)

    assert recoloured[8, 4] == CHANGED
    assert recoloured[8, 11] == KEPT
    assert recoloured[0, 0] == BACKGROUND
    assert set(on_gray.unique().tolist()) == {BACKGROUND, KEPT}


def test_frozen_text(codes, text, transformer):
    """A reader gives each crate its features once, and a batch brings them instead of tokens."""
    packers, device = Packers(codes.source, workers=0), torch.device("cpu")
    shelves = Shelves(packers, nets.build_codec().eval(), transformer, device, 512, SMALL_PLANS)
    rotary = nets.text_rotary(text)
    shelves.read = lambda ids: text_features(text, ids, codes.pad, rotary).detach()
    packers.ask(Order(8, 8, 3, seed=1))
    crate = pack(Order(8, 8, 3, seed=1), codes)
    shelves.each[0].put(shelves._loaded(packers.take(), 64))
    batch = shelves.each[0].batch_of(random.Random(0))
    known = shelves.read(torch.from_numpy(crate.ids).flatten(0, 1).long())

    assert "ids" not in batch
    assert batch["features"].shape == (2, SEQUENCE_LENGTH, 192)
    for features in batch["features"]:
        assert any(torch.allclose(features, each, atol=1e-5) for each in known)


@pytest.mark.parametrize(
    ("plans", "edits"),
    [(PLANS, 0.24), (SMALL_PLANS, 0.24), (EDIT_PLANS, 0.54), (SMALL_EDIT_PLANS, 0.72)],
)
def test_plans_are_a_whole(plans, edits):
    """Shares of all steps, and the edits' part of them."""
    assert sum(plan.share for plan in plans) == pytest.approx(1)
    assert sum(plan.share for plan in plans if plan.is_edit) == pytest.approx(edits)


@torch.no_grad()
def test_linear_start(codes):
    """Before any training the autoencoder passes colours: its latents are the blocks' means."""
    torch.manual_seed(0)
    codec = nets.build_codec().eval()
    packers = Packers(codes.source, workers=0)
    packers.ask(Order(16, 16, 8, seed=5))
    (images,) = ordinary_images(packers.take(), torch.device("cpu"))
    latents = codec.encode(images * 2 - 1).latent_dist.mode()
    wanted = linear_start.anchors(images * 2 - 1)
    again = codec.decode(latents).sample / 2 + 0.5

    assert (latents[:, :12] - wanted).square().mean() < 0.02 * wanted.square().mean()
    assert -10 * (again - images).square().mean().log10() > 18
    flat = codec.decode(codec.encode(torch.full((1, 3, 64, 64), 0.3)).latent_dist.mode()).sample
    assert (flat[..., 16:48, 16:48] - 0.3).abs().max() < 0.15


def test_attributes_of_a_scene():
    """Attributes name the background and each thing, and say that there is no second."""
    known = attributes.of_scene(Scene((Thing("square", "green", "large", "top"),), "red"))

    assert known == [1, 2, 2, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_attribute_loss():
    """Certain and right answers cost nothing and count as read without fault."""
    heads = attributes.AttributeHeads(64, 3)
    labels = torch.zeros(2, len(attributes.CLASSES), dtype=torch.long)
    certain = torch.full((2, len(attributes.CLASSES), max(attributes.CLASSES)), -30.0)
    certain[..., 0] = 0

    loss, right = attributes.attribute_loss([certain] * 3, labels)
    guessed = heads(torch.randn(2, 5, 192), torch.eye(5)[[3, 4]].bool())

    assert loss == 0
    assert right == 1
    assert guessed[0].exp().sum(-1).allclose(torch.ones(2, len(attributes.CLASSES)))
