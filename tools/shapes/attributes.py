"""What the text encoder must know of a prompt, as classes to guess.

Small heads read these attributes off the hidden states while the text encoder learns, and are
thrown away afterwards: so colour and shape are bound to their object before the transformer asks.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.shapes.prompts import Instruction
from tools.shapes.scenes import COLOUR_NAMES, PLACES, SHAPES, SIZES, Edit, Scene

_THING = (len(SHAPES) + 1, len(COLOUR_NAMES) + 1, len(SIZES) + 1, len(PLACES) + 1)
_NAMING = (len(SHAPES) + 1, len(COLOUR_NAMES) + 1)
# background; two things; kind of change; what it becomes; by what it is named. Class 0 is "none".
CLASSES = (len(COLOUR_NAMES) + 1, *_THING, *_THING, 4, *_NAMING, *_NAMING)
_RECOLOUR, _REPLACE, _BACKGROUND = 1, 2, 3


def of_scene(scene: Scene) -> list[int]:
    """The attributes of a prompt that describes a scene."""
    things: list[int] = []
    for thing in scene.things:
        things += [_shape(thing.shape), _colour(thing.colour)]
        things += [SIZES.index(thing.size) + 1, PLACES.index(thing.place) + 1]
    things += [0] * (8 - len(things))
    return [_colour(scene.background), *things, 0, 0, 0, 0, 0]


def of_edit(edit: Edit, said: Instruction) -> list[int]:
    """The attributes of an instruction that leads from one scene to another."""
    if edit.target is None:
        return [_colour(edit.after.background), *[0] * 8, _BACKGROUND, 0, 0, 0, 0]
    old, new = edit.before.things[edit.target], edit.after.things[edit.target]
    replaced = old.shape != new.shape
    shape = _shape(new.shape) if replaced else 0
    colour = _colour(new.colour) if old.colour != new.colour else 0
    named = (_shape(old.shape) * said.names_shape, _colour(old.colour) * said.names_colour)
    return [0] * 9 + [_REPLACE if replaced else _RECOLOUR, shape, colour, *named]


def _shape(name: str) -> int:
    return SHAPES.index(name) + 1


def _colour(name: str) -> int:
    return COLOUR_NAMES.index(name) + 1


class AttributeHeads(nn.Module):
    """One linear head for each layer that is read, on the last token of the chat template."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, sum(CLASSES)) for _ in range(layers))
        self.spread, self.absent = (nn.Buffer(part, persistent=False) for part in _table())

    def forward(self, features: Tensor, last: Tensor) -> list[Tensor]:
        """Each head's log-probabilities [n, attributes, classes].

        `last` is one-hot over the 64 positions.
        """
        states = (last[:, :, None] * features).sum(1).chunk(len(self.heads), dim=-1)
        scores = [
            head(F.rms_norm(state, (state.shape[-1],))).float() @ self.spread
            for head, state in zip(self.heads, states, strict=True)
        ]
        shape = (-1, *self.absent.shape)
        return [(score.view(shape) + self.absent).log_softmax(-1) for score in scores]


def _table() -> tuple[Tensor, Tensor]:
    """A matrix that spreads a head's scores to one row for each attribute, and what fills the rows.

    One product and one softmax instead of fourteen of each.
    """
    most = max(CLASSES)
    spread = torch.zeros(sum(CLASSES), len(CLASSES), most)
    absent = torch.full((len(CLASSES), most), -1e4)
    start = 0
    for index, count in enumerate(CLASSES):
        spread[start : start + count, index, :count] = torch.eye(count)
        absent[index, :count] = 0
        start += count
    return spread.flatten(1), absent


def last_token(ids: Tensor, pad: int) -> Tensor:
    """One-hot [n, 64]: the last token that is not padding."""
    length = (ids != pad).sum(1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device) == length - 1


def attribute_loss(scores: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The heads' mean cross-entropy, and the share of prompts the last head reads without fault."""
    chosen = labels[:, :, None] == torch.arange(scores[0].shape[-1], device=labels.device)
    loss = torch.stack([-(score * chosen).sum((1, 2)).mean() for score in scores]).mean()
    right = (scores[-1].argmax(-1) == labels).all(1).float().mean()
    return loss, right
