"""The demo model's tokenizer: a small byte-level BPE that says Qwen's chat template.

The merges are learnt from the prompts themselves, seeded; all 256 bytes are in the vocabulary, so
any Unicode prompt has tokens. The special tokens are Qwen3's, in its order.
"""

import random
from pathlib import Path

import torch
from tokenizers import Regex as TokenPattern
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import Qwen2TokenizerFast

from tools.shapes.prompts import describe, instruct
from tools.shapes.scenes import sample_edit, sample_scene

SEQUENCE_LENGTH = 64
PAD = "<|endoftext|>"
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
SPECIAL_TOKENS = (
    PAD,
    *("<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
VOCABULARY_SIZE = 640

# Qwen2's splitting rule (transformers, models/qwen2/tokenization_qwen2.py).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(seed: int = 0, prompts: int = 20_000) -> Qwen2TokenizerFast:
    """Learn the merges from seeded prompts and dress the result as Qwen's tokenizer."""
    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenPattern(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(random.Random(seed), prompts), trainer)
    raw.add_special_tokens(list(SPECIAL_TOKENS))
    return Qwen2TokenizerFast(
        tokenizer_object=raw,
        unk_token=PAD,
        eos_token="<|im_end|>",
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=SEQUENCE_LENGTH,
    )


def _corpus(rng: random.Random, prompts: int) -> list[str]:
    words = ["user\n", "\n", "assistant\n", "\n\n"] * prompts
    edits = [instruct(sample_edit(rng), rng).text for _ in range(prompts // 4)]
    return words + edits + [describe(sample_scene(rng), rng) for _ in range(prompts)]


class PromptCodes:
    """Prompts as rows of exactly 64 token ids, padded on the right as the pipeline pads them."""

    def __init__(self, tokenizer_file: Path) -> None:
        self.source = tokenizer_file
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.pad: int = self._tokenizer.encode(PAD).ids[0]

    def fits(self, prompt: str) -> bool:
        """Whether the prompt and the template around it fit without losing a token."""
        return len(self._ids(prompt)) <= SEQUENCE_LENGTH

    def row(self, prompt: str) -> list[int]:
        """The ids of one prompt in its template."""
        ids = self._ids(prompt)[:SEQUENCE_LENGTH]
        return ids + [self.pad] * (SEQUENCE_LENGTH - len(ids))

    def rows(self, prompts: list[str]) -> Tensor:
        """The ids of several prompts, [n, 64]."""
        return torch.tensor([self.row(prompt) for prompt in prompts])

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(TEMPLATE.format(prompt)).ids
        return ids
