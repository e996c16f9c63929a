import pytest

from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.errors import UsageError

ORIGINAL = 16 * 10**6


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 512 * 2**20),
        ("1.5gib", 3 * 2**29),
        ("3 KiB", 3072),
        ("2GB", 2 * 10**9),
        ("7mb", 7 * 10**6),
        ("1KB", 1000),
        ("65536bytes", 65536),
        ("65536", 65536),
        ("25%", 4 * 10**6),
        ("3.2bits", 3_200_000),
        ("16 bits", ORIGINAL),
        ("200%", 2 * ORIGINAL),
        ("1024GiB", 2**40),
        ("0.1%", 16_000),
    ],
)
def test_every_form_of_a_budget_is_read(text: str, size: int) -> None:
    assert parse_budget(text, ORIGINAL) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", "much", "%", "1e3MiB", "1e308GiB", "5 apples", "--3MiB", "3.2.1bits", "nan", "inf", "٣MiB", "1_000MiB"),
        *("0x10", "0", "0%", "-4MiB", "0bits", "0.00000001%"),
    ],
)
def test_anything_else_is_wrong_usage_and_the_message_shows_it(text: str) -> None:
    with pytest.raises(UsageError, match="budget") as caught:
        parse_budget(text, ORIGINAL)
    assert repr(text) in str(caught.value)
    assert "512MiB" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["9" * 39, "1048577GiB", "99999999%", "999999bits", "9" * 400 + "MiB", "1" + "0" * 5000]
)
def test_what_no_machine_holds_is_refused_in_a_short_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"more than any machine holds|too long") as caught:
        parse_budget(text, ORIGINAL)
    assert len(str(caught.value)) < 250


def test_a_fraction_of_a_byte_is_rounded_down() -> None:
    assert parse_budget("33.3%", 10) == 3
