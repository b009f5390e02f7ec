"""The command that makes the checkpoint: `python -m tools.shapes.train --out DIR` on one GPU.

Each phase stops by the clock, the last so that all is written within `--minutes`. A long training
may be cut into calls: `--span 0 0.5` is the first half of the whole schedule, and `--resume DIR
--span 0.5 1` goes on from what the first call left there.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from transformers import Qwen2TokenizerFast

from tools.shapes import checkpoint
from tools.shapes.adherence import PipelineSampler, TrainedSampler
from tools.shapes.codec import Pace, train_codec
from tools.shapes.exam import Question, edit_questions, examine, scene_questions
from tools.shapes.feed import Packers
from tools.shapes.flow import Trainer
from tools.shapes.nets import build_codec, build_text_encoder, build_transformer, text_rotary
from tools.shapes.passes import Operations, compiled
from tools.shapes.shelves import EDIT_PLANS, PLANS, SMALL_EDIT_PLANS, SMALL_PLANS
from tools.shapes.vocabulary import PromptCodes, build_tokenizer

_log = logging.getLogger("shapes")

_STARTED = time.monotonic()
# For writing the checkpoint, the examination and the pipeline from disk.
_FINISH_S = 42
_PLANS = {
    "all": PLANS,
    "small": SMALL_PLANS,
    "edits": EDIT_PLANS,
    "small-edits": SMALL_EDIT_PLANS,
}


def main() -> None:
    """Run all phases and write the checkpoint, its figures and a sheet of samples."""
    arguments = _arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    _log_to(arguments.out / "train.log")
    # The tokenizer's threads must not have run when the workers are forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.draw)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    resumed = None
    if arguments.resume:
        resumed = checkpoint.unpack(arguments.resume, arguments.work / "resumed")
    tokenizer = _tokenizer(resumed)
    tokenizer.save_pretrained(arguments.work / "tokenizer")
    tokens = arguments.work / "tokenizer" / "tokenizer.json"
    packers = Packers(tokens, arguments.workers, arguments.draw)
    try:
        figures = _Run(arguments, device, tokenizer, packers, PromptCodes(tokens), resumed).run()
    finally:
        packers.close()
    _log.info("done: %s", json.dumps(figures))


def _tokenizer(resumed: Path | None) -> Qwen2TokenizerFast:
    """The one whose tokens the text encoder knows; another sampling of prompts merges otherwise."""
    if resumed is None:
        return build_tokenizer()
    return Qwen2TokenizerFast.from_pretrained(resumed / "tokenizer")


class _Run:
    """One call of the command."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        device: torch.device,
        tokenizer: Qwen2TokenizerFast,
        packers: Packers,
        codes: PromptCodes,
        resumed: Path | None,
    ) -> None:
        self._arguments, self._device = arguments, device
        self._tokenizer, self._packers, self._codes = tokenizer, packers, codes
        self._resumed = resumed
        self._ends = _STARTED + arguments.minutes * 60
        self._folder = arguments.work / checkpoint.FOLDER
        self._figures: dict[str, object] = {"device": _device_name(device)}

    def run(self) -> dict[str, object]:
        """All phases, in order."""
        arguments = self._arguments
        codec = self._codec()
        text = build_text_encoder()
        rotary = text_rotary(text)
        self._trainer = Trainer(
            text.to(self._device),
            build_transformer().to(self._device),
            codec,
            self._packers,
            pad=self._codes.pad,
            by=self._operations(),
            device=self._device,
            prompt_rotary=rotary,
            shrink=arguments.shrink,
            plans=_PLANS[arguments.plans],
        )
        self._sampler = TrainedSampler(self._trainer, codec, self._codes)
        self._trained_codec = codec
        if arguments.resume:
            checkpoint.go_on(self._trainer, arguments.resume)
            if arguments.freeze_text:
                self._trainer.freeze_text()
        else:
            pace = Pace(arguments.text_minutes * 60, arguments.shrink)
            self._figures |= self._trainer.learn_attributes(pace)
        left = self._ends - time.monotonic() - _FINISH_S
        _log.info("%.0f s are left for the flow", left)
        pace = Pace(max(10.0, left), arguments.shrink)
        self._figures |= self._trainer.learn_flow(
            pace, tuple(arguments.span), self._keep, arguments.check_minutes * 60
        )
        self._finish()
        return self._figures

    def _codec(self) -> AutoencoderKLFlux2:
        arguments = self._arguments
        if self._resumed is not None and not arguments.new_codec:
            codec = AutoencoderKLFlux2.from_pretrained(self._resumed / "vae").float()
            return codec.to(self._device).eval()
        codec = build_codec()
        pace = Pace(arguments.codec_minutes * 60, arguments.shrink)
        self._figures |= train_codec(codec, self._packers, pace, self._device)
        _log.info("codec done: %s", self._figures)
        # The flow learns the latents of the codec as it will be stored, in 16 bits.
        return codec.to(torch.bfloat16).float()

    def _operations(self) -> Operations:
        return compiled() if self._arguments.compile else Operations()

    def _keep(self, step: int) -> None:
        """A copy and a short examination on the way."""
        self._write()
        self._ask(f"after step {step}", scene_questions(48) + edit_questions(24))

    def _finish(self) -> None:
        self._write()
        share = self._arguments.shrink
        questions = scene_questions(200 // share) + edit_questions(60 // share)
        self._figures["sampler"] = self._ask("at the end", questions, sheet=True)
        self._save_figures()
        few = scene_questions(12) + edit_questions(6)
        marks = examine(few, PipelineSampler(self._folder, self._arguments.device).answer(few))
        self._figures["pipeline"] = marks.figures()
        _log.info("the pipeline from disk: %s", marks)
        self._save_figures()

    def _save_figures(self) -> None:
        self._figures["seconds"] = round(time.monotonic() - _STARTED, 1)
        text = json.dumps(self._figures, indent=2) + "\n"
        (self._arguments.out / "figures.json").write_text(text)

    def _write(self) -> None:
        checkpoint.write(self._trainer, self._trained_codec, self._tokenizer, self._folder)
        checkpoint.send(self._trainer, self._folder, self._arguments.out)
        size = sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())
        self._figures["bytes"] = size

    def _ask(
        self, when: str, questions: list[Question], *, sheet: bool = False
    ) -> dict[str, float]:
        answers = self._sampler.answer(questions)
        marks = examine(questions, answers)
        _log.info("%s: %s", when, marks)
        for failure in marks.failures[: 40 if sheet else 6]:
            _log.info("  failed %s", failure)
        if sheet:
            _save_sheet(answers, self._arguments.out / "sheet.png")
        return marks.figures()


def _save_sheet(answers: list[np.ndarray], path: Path) -> None:
    tiles = [a for a in answers if a.shape == (256, 256, 3)]
    tiles = [*tiles[:48], *tiles[-16:]][:64]
    tiles += [np.zeros((256, 256, 3), np.uint8)] * (-len(tiles) % 8)
    rows = [np.concatenate(tiles[at : at + 8], axis=1) for at in range(0, len(tiles), 8)]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.BOX).save(path)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _log_to(path: Path) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), logging.FileHandler(path)]
    logging.basicConfig(
        level=logging.INFO, handlers=handlers, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="scratch folder")
    parser.add_argument(
        "--resume", type=Path, help="go on from another call's --out, or from a checkpoint's folder"
    )
    parser.add_argument(
        "--new-codec", action="store_true", help="with --resume: keep all but the autoencoder"
    )
    parser.add_argument(
        "--freeze-text", action="store_true", help="with --resume: train the transformer alone"
    )
    parser.add_argument(
        "--plans", choices=_PLANS, default="all", help="what most steps are taken from"
    )
    parser.add_argument("--check-minutes", type=float, default=2.0, help="between examinations")
    parser.add_argument("--codec-minutes", type=float, default=1.3)
    parser.add_argument("--text-minutes", type=float, default=0.7)
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything")
    parser.add_argument("--span", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument(
        "--draw", type=int, default=0, help="which scenes: with --resume, others than before"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3))
    parser.add_argument("--shrink", type=int, default=1, help="divide batches, to rehearse")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args()


if __name__ == "__main__":
    main()
