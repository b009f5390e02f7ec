"""What KLEIN_DEVICE may say, and how it is refused."""

from __future__ import annotations

import pytest

from app.errors import StartupError
from app.settings import Settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", ("0",)),
        (" 1 , 00 ", ("1", "0")),
        ("GPU-1B2C3D4E", ("GPU-1b2c3d4e",)),
        ("mig-1b2c3d4e-0000-1111-2222-333344445555", ("MIG-1b2c3d4e-0000-1111-2222-333344445555",)),
        ("0000:65:00.0", ("0000:65:00.0",)),
        ("00000000:0A:00.0", ("0000:0a:00.0",)),
        ("65:00.0", ("0000:65:00.0",)),
        ("10000:01:00.0", ("10000:01:00.0",)),
        ("0,GPU-1b,0000:65:00.0", ("0", "GPU-1b", "0000:65:00.0")),
        ("ALL", ("all",)),
        ("cpu", ("cpu",)),
        ("cpu:1", ("cpu",)),
        ("CPU:3", ("cpu", "cpu", "cpu")),
    ],
)
def test_every_form_is_read_into_one(text: str, expected: tuple[str, ...]) -> None:
    """From the environment, from the command line, and back from the settings themselves."""
    settings = Settings.read({"KLEIN_DEVICE": text})

    assert settings.device == expected
    assert settings.is_cpu is (expected[0] == "cpu")
    assert Settings.read({}, device=text).device == expected
    assert Settings(device=settings.device).device == expected


def test_without_it_the_first_card_computes() -> None:
    """And the command line wins over the environment."""
    assert Settings.read({}).device == ("0",)
    assert "device" not in Settings.read({}).model_fields_set
    assert Settings.read({"KLEIN_DEVICE": "cpu"}, device="1").device == ("1",)
    assert Settings(device=1).device == ("1",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,0", "twice; leave one out"),
        ("0,00", "twice; leave one out"),
        ("0000:65:00.0,65:00.0", "twice; leave one out"),
        ("0,", "entry 2 is empty; take the comma away"),
        (",", "entry 1 is empty"),
        ("cpu,0", "cpu stands alone"),
        ("0,cpu", "cpu stands alone"),
        ("cpu,cpu", "several processes are cpu:3"),
        ("cpu:0", "asks for 0 processes, and 1 to 16 are possible"),
        ("cpu:17", "asks for 17 processes"),
        ("cpu:999999999", "1 to 16 are possible"),
        (",".join(map(str, range(17))), "asks for 17 processes"),
        ("all,0", "no other can stand beside it"),
        ("cuda:0", "entry 1 is no number such as 0"),
        ("-1", "no number such as 0"),
        ("123456", "no number such as 0"),
        ("\u00b2", "no number such as 0"),
        ("GPU-", "no UUID such as GPU-1b2c3d4e"),
        ("65:00.9", "no PCI id such as 0000:65:00.0"),
    ],
)
def test_what_it_cannot_mean_is_refused_with_what_to_do(text: str, said: str) -> None:
    """In one sentence that does not repeat the value."""
    with pytest.raises(StartupError, match=said) as refused:
        Settings.read({"KLEIN_DEVICE": text})

    assert refused.value.message.startswith("KLEIN_DEVICE has a value that does not fit: ")
