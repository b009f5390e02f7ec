"""Write the tokenizer that comes with the package, from Qwen's vocab.json and merges.txt.

    python tools/make_tokenizer.py FOLDER

FOLDER holds the two files, whose hashes must be those of the catalogue. They are kept as they are:
transformers reads them in a quarter of a second, half of what tokenizer.json takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app.engine.hub.fetch import hash_file
from app.engine.models.flux2_klein import KLEIN, TOKENIZER

FIRST_ID = 151_643
ADDED = (
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    ("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    ("<tool_call>", "</tool_call>"),
    ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    ("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    ("<think>", "</think>"),
)
SPECIAL_GROUPS = 3
"""Only tokens of the first groups are special: left out where text is decoded without those."""
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


def main() -> None:
    """Check the two files, and write them with what belongs to them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds vocab.json and merges.txt")
    folder = parser.parse_args().folder
    published = {file.path: file.sha256 for file in KLEIN.shared}
    TOKENIZER.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        if hash_file(folder / name) != published[f"tokenizer/{name}"]:
            raise SystemExit(f"{name} is not the one that was published with {KLEIN.spec.title}.")
        shutil.copyfile(folder / name, TOKENIZER / name)
    (TOKENIZER / "chat_template.jinja").write_text(TEMPLATE)
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config(), indent=1) + "\n")


def config() -> dict[str, object]:
    """Return what tokenizer_config.json says."""
    special = {name for group in ADDED[:SPECIAL_GROUPS] for name in group}
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "added_tokens_decoder": {
            str(number): {
                "content": name,
                **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False),
                "special": name in special,
            }
            for number, name in enumerate((name for group in ADDED for name in group), FIRST_ID)
        },
    }


if __name__ == "__main__":
    main()
