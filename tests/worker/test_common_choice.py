"""Cards of one service compute alike, or a seed's pixels would depend on the card."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from app.worker.common_choice import CommonChoice
from tests.support.fakes import INFO
from tests.worker.conftest import CONFIG

FP8 = replace(INFO, precision="fp8", attention="cuDNN", attention_choice="cudnn")


def test_all_take_what_the_first_chose() -> None:
    """Those that load later are told; one that loaded meanwhile and differs loads again, once."""
    workers = [
        SimpleNamespace(
            supervisor=SimpleNamespace(config=CONFIG),
            device=SimpleNamespace(name="RTX", uuid=f"GPU-{number}"),
        )
        for number in range(3)
    ]
    again: list[object] = []
    # Hashable, as the pool's workers are.
    workers = [type("Worker", (), vars(each))() for each in workers]
    choice = CommonChoice(SimpleNamespace(workers=workers, load_again=again.append))

    assert choice.admits(workers[0], FP8)
    assert {each.supervisor.config.precision for each in workers} == {"fp8"}
    # The setting's word for it: what people read of a kernel is another, and ends a start.
    assert {each.supervisor.config.attention for each in workers} == {"cudnn"}
    assert choice.admits(workers[1], FP8)
    assert not choice.admits(workers[2], replace(FP8, attention="torch"))
    assert again == [workers[2]]
    assert choice.admits(workers[2], replace(FP8, attention="torch"))
    assert again == [workers[2]]
