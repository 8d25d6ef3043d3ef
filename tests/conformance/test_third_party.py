"""Third-party vectors, each expectation written down and each exception explained.

The data lies beside the repository, in ../shared/conformance, and is not copied into it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from records import canonical, keys
from records.errors import InvalidError, MalformedError
from records.receipt import verify_digest

SHARED = Path(__file__).parents[2].parent / "shared" / "conformance"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the vectors are not there: expected ../shared/conformance")

FLOAT, ZERO, KEYS, BIG = "floats are not allowed", "no -0", "occurs twice", "2**53 - 1"
SURROGATE, NOT_UTF8 = "half a surrogate pair", "not UTF-8"
#: Texts that are JSON and are refused on purpose, with the rule that does it: what is hashed must have one meaning.
REFUSED_ON_PURPOSE = {
    "y_number.json": FLOAT,
    "y_number_0e+1.json": FLOAT,
    "y_number_0e1.json": FLOAT,
    "y_number_double_close_to_zero.json": FLOAT,
    "y_number_int_with_exp.json": FLOAT,
    "y_number_minus_zero.json": ZERO,
    "y_number_negative_zero.json": ZERO,
    "y_number_real_capital_e.json": FLOAT,
    "y_number_real_capital_e_neg_exp.json": FLOAT,
    "y_number_real_capital_e_pos_exp.json": FLOAT,
    "y_number_real_exponent.json": FLOAT,
    "y_number_real_fraction_exponent.json": FLOAT,
    "y_number_real_neg_exp.json": FLOAT,
    "y_number_real_pos_exponent.json": FLOAT,
    "y_number_simple_real.json": FLOAT,
    "y_object_duplicated_key.json": KEYS,
    "y_object_duplicated_key_and_value.json": KEYS,
    "y_object_extreme_numbers.json": FLOAT,
    "y_structure_lonely_negative_real.json": FLOAT,
}
#: Texts that parsers read differently: the four that mean one thing here, and why each other is refused.
TRANSFORM = {
    "number_-9223372036854775808.json": BIG,
    "number_-9223372036854775809.json": BIG,
    "number_1.0.json": FLOAT,
    "number_1.000000000000000005.json": FLOAT,
    "number_1000000000000000.json": [1000000000000000],
    "number_10000000000000000999.json": BIG,
    "number_1e-999.json": FLOAT,
    "number_1e6.json": FLOAT,
    "number_9223372036854775807.json": BIG,
    "number_9223372036854775808.json": BIG,
    # Normalisation forms are different keys: nothing is normalised before it is hashed.
    "object_key_nfc_nfd.json": {"\u00e9": "NFC", "e\u0301": "NFD"},
    "object_key_nfd_nfc.json": {"\u00e9": "NFC", "e\u0301": "NFD"},
    "object_same_key_different_values.json": KEYS,
    "object_same_key_same_value.json": KEYS,
    "object_same_key_unclear_values.json": ZERO,
    "string_1_escaped_invalid_codepoint.json": SURROGATE,
    "string_1_invalid_codepoint.json": NOT_UTF8,
    "string_2_escaped_invalid_codepoints.json": SURROGATE,
    "string_2_invalid_codepoints.json": NOT_UTF8,
    "string_3_escaped_invalid_codepoints.json": SURROGATE,
    "string_3_invalid_codepoints.json": NOT_UTF8,
    "string_with_escaped_NULL.json": ["A\x00B"],
}


def parsing(prefix: str) -> list[Path]:
    return sorted((SHARED / "jsontestsuite" / "test_parsing").glob(f"{prefix}_*.json"))


def test_all_of_it_is_there() -> None:
    assert [len(parsing(prefix)) for prefix in "nyi"] == [188, 95, 35]
    assert {path.name for path in (SHARED / "jsontestsuite" / "test_transform").iterdir()} == set(TRANSFORM)


@pytest.mark.parametrize("prefix", ["n", "i"])
def test_what_is_no_json_or_may_be_none_is_refused(prefix: str) -> None:
    """188 of 188 that a parser must refuse, and 35 of 35 that it may: each of the latter has no single meaning."""
    read = []
    for path in parsing(prefix):
        try:
            canonical.loads(path.read_bytes())
        except MalformedError:
            continue
        read.append(path.name)
    assert read == []


def test_what_is_json_is_read_but_for_the_exceptions() -> None:
    refused = {}
    for path in parsing("y"):
        try:
            value = canonical.loads(path.read_bytes())
        except MalformedError as error:
            refused[path.name] = str(error)
            continue
        assert value == json.loads(path.read_bytes())
        assert canonical.loads(canonical.dumps(value)) == value
    assert set(refused) == set(REFUSED_ON_PURPOSE)
    for name, reason in REFUSED_ON_PURPOSE.items():
        assert reason in refused[name], (name, refused[name])


@pytest.mark.parametrize(("name", "expected"), TRANSFORM.items())
def test_what_parsers_read_differently(name: str, expected: Any) -> None:
    data = (SHARED / "jsontestsuite" / "test_transform" / name).read_bytes()
    if isinstance(expected, str):
        with pytest.raises(MalformedError) as caught:
            canonical.loads(data)
        assert expected in str(caught.value)
    else:
        assert canonical.loads(data) == expected


def test_wycheproof() -> None:
    """151 of 151: 88 that verify, 63 that must not; no exception."""
    groups = json.loads((SHARED / "wycheproof" / "ed25519_test.json").read_bytes())["testGroups"]
    verified = refused = 0
    wrong = []
    for group in groups:
        public = bytes.fromhex(group["publicKey"]["pk"])
        for case in group["tests"]:
            try:
                verify_digest(public, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
            except InvalidError:
                refused += 1
                if case["result"] != "invalid":
                    wrong.append(case["tcId"])
            else:
                verified += 1
                if case["result"] != "valid":
                    wrong.append(case["tcId"])
    assert (wrong, verified, refused) == ([], 88, 63)


def test_rfc8032() -> None:
    """1024 of 1024: the public key and the signature of each seed, bit for bit; one changed bit does not verify."""
    lines = (SHARED / "rfc8032" / "sign.input").read_text().splitlines()
    assert len(lines) == 1024
    for number, line in enumerate(lines):
        secret, public, message, signed = (bytes.fromhex(field) for field in line.split(":")[:4])
        key = keys.private_key(secret[:32])
        assert key.public.raw == public == secret[32:]
        signature = key.sign(message)
        assert signature + message == signed
        verify_digest(public, message, signature)
        changed = bytearray(signature)
        changed[number % 64] ^= 1 << (number % 8)
        with pytest.raises(InvalidError):
            verify_digest(public, message, bytes(changed))
