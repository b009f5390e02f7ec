"""torch's private names are in one module, and each has something to fall back on."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import torch

from app.engine import torch_private
from app.engine.models.registry import find_model
from app.engine.modules.attention import KERNELS, kernel_fault

pytestmark = pytest.mark.torch

APP = Path(torch_private.__file__).parent.parent
FOREIGN = ("torch", "diffusers", "transformers", "functional", "config", "processor", "network")
_FOREIGN = re.compile("|".join(FOREIGN))


def private_names(source: str) -> list[str]:
    """Names of torch and its kin that begin with an underscore: read, imported, or in a string."""
    found: list[str] = []
    if not _FOREIGN.search(source):
        return found
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            names = ast.unparse(node).split(".")
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(each.name for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for each in node.names for part in each.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As in `sys.modules.get("torch._inductor")`; docstrings say names in sentences.
            names = node.value.split(".") if " " not in node.value else []
        else:
            continue
        is_private = any(name.startswith("_") and not name.startswith("__") for name in names)
        if names and names[0] in FOREIGN and is_private:
            found.append(".".join(names))
    return found


def test_no_other_module_knows_a_private_name():
    """All that a new version of torch may take away is in one place."""
    found = {
        str(path.relative_to(APP)): names
        for path in sorted(APP.rglob("*.py"))
        if (names := private_names(path.read_text()))
    }

    assert list(found) == ["engine/torch_private.py"]


@pytest.mark.parametrize(
    "source",
    [
        "torch._int_mm(a, b)",
        "from torch._dynamo import config",
        "import torch._inductor.config",
        "torch.cuda.memory._set_allocator_settings('')",
        "config._attn_implementation = 'sdpa'",
        "processor._resize_to_target_area(picture)",
        "sys.modules['torch._inductor']",
        "torch.ops.aten._scaled_dot_product_cudnn_attention",
    ],
)
def test_every_spelling_is_seen(source):
    """Read, set, imported or named in a string."""
    assert private_names(source)


def refuse(settings: str) -> None:
    raise RuntimeError(f"unknown setting {settings}")


def test_the_allocator_is_set_by_either_name_or_by_the_variable(monkeypatch):
    """The new name does not warn; without both, the variable that torch reads is set."""
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    torch_private.set_allocator("a:1")
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", told.append)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse)
    torch_private.set_allocator("b:1")
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    torch_private.set_allocator("b:2")
    monkeypatch.delattr(torch.cuda.memory, "_set_allocator_settings")
    torch_private.set_allocator("c:1")

    assert told == ["a:1", "b:1", "b:2"]
    assert os.environ["PYTORCH_ALLOC_CONF"] == "c:1"


def test_fp8_is_multiplied_by_either_function(monkeypatch):
    """The public function gives what the private one gives, bit by bit."""
    x, weight = torch.randn(2, 16, 32).to(torch.float8_e4m3fn)
    scales = torch.tensor(0.5), torch.tensor(3.0)
    right = torch_private.scaled_mm(x, weight, *scales, torch.bfloat16)
    monkeypatch.delattr(torch, "_scaled_mm")

    assert torch.equal(torch_private.scaled_mm(x, weight, *scales, torch.bfloat16), right)
    torch.testing.assert_close(
        right.float(), 1.5 * x.float() @ weight.float().t(), rtol=0.01, atol=0.1
    )


def test_int8_is_multiplied_exactly_without_the_private_name(monkeypatch):
    """Sums that no float32 can hold are right to the last digit."""
    x, weight = torch.randint(-127, 128, (2, 32, 4096), dtype=torch.int8)
    right = torch_private.int_mm(x, weight)
    monkeypatch.delattr(torch, "_int_mm")

    assert torch.equal(torch_private.int_mm(x, weight), right)
    assert torch.equal(right, (x.long() @ weight.long().t()).int())


def test_attention_without_cudnns_operation_is_torchs(monkeypatch):
    """The kernel says why it cannot be taken."""
    monkeypatch.setattr(torch_private, "has_cudnn_attention", lambda: False)
    fault = kernel_fault(KERNELS["cudnn"], torch.device("cuda"), find_model("shapes").architecture)

    assert fault == "this torch does not offer it"
