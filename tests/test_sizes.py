import pytest
from hypothesis import given
from hypothesis import strategies as st

from edm.errors import UsageError
from edm.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 << 20),
        ("2G", 2 << 30),
        ("512K", 512 << 10),
        ("1T", 1 << 40),
        ("1.5G", 3 << 29),
        ("4096", 4096),
        (4096, 4096),
        ("0", 0),
        (" 64 MiB ", 64 << 20),
        ("64mb", 64 << 20),
    ],
)
def test_size_is_parsed(text, size):
    assert parse_size(text) == size


def test_percentage_is_of_the_whole():
    assert parse_size("25%", whole_bytes=1 << 30) == 1 << 28
    assert parse_size("12.5 %", whole_bytes=800) == 100


@pytest.mark.parametrize(
    "text", ["3X", "", "M", "-1", "-1M", "1e9", "64M M", "0x10", "٣M", "nan", "1.M", "9" * 5000, True, None, 1.5]
)
def test_bad_size_is_a_usage_error_that_says_how(text):
    with pytest.raises(UsageError) as error:
        parse_size(text, whole_bytes=1 << 30)
    assert str(error.value) == f"bad size '{text}': use a number with K, M, G or T, or a percentage"


def test_percentage_of_nothing_is_not_offered():
    with pytest.raises(UsageError, match=r"^bad size '5%': use a number with K, M, G or T$"):
        parse_size("5%")


def test_size_beyond_any_memory_is_refused():
    with pytest.raises(UsageError, match="larger than any memory"):
        parse_size("9999999T")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (312, "312 bytes"),
        (1024, "1K"),
        (64 << 20, "64M"),
        (3 << 29, "1.5G"),
        (5 << 50, "5120T"),
    ],
)
def test_size_is_formatted_for_people(size, text):
    assert format_size(size) == text


@given(st.integers(1024, 1 << 50))
def test_formatted_size_parses_back_within_its_last_digit(size):
    assert abs(parse_size(format_size(size)) - size) <= size * 0.05 + 1
