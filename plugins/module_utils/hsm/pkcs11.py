"""The subset of PKCS#11 2.40 for the keys of volumes and of the issuing CA, by ctypes.

Why no library: docs/develop/decisions/0077-keys-in-tokens-are-asked-by-ctypes.md.

A PIN is an argument of a function here, never of a program, and never part of a URI.
"""

from __future__ import annotations

import contextlib
import ctypes
import secrets
from collections.abc import Iterator, Mapping
from ctypes import POINTER, byref, c_char, c_ubyte, c_ulong, c_void_p
from dataclasses import dataclass
from typing import Any

# Indices in CK_FUNCTION_LIST, after its version.
FUNCTIONS = {
    "C_Initialize": 0,
    "C_GetInfo": 2,
    "C_GetSlotList": 4,
    "C_GetTokenInfo": 6,
    "C_InitToken": 9,
    "C_InitPIN": 10,
    "C_SetPIN": 11,
    "C_OpenSession": 12,
    "C_CloseSession": 13,
    "C_Login": 18,
    "C_DestroyObject": 22,
    "C_GetAttributeValue": 24,
    "C_FindObjectsInit": 26,
    "C_FindObjects": 27,
    "C_FindObjectsFinal": 28,
    "C_DecryptInit": 33,
    "C_Decrypt": 34,
    "C_SignInit": 42,
    "C_Sign": 43,
    "C_GenerateKeyPair": 59,
    "C_DeriveKey": 62,
}
RETURNED = {
    0x5: "CKR_GENERAL_ERROR",
    0x6: "CKR_FUNCTION_FAILED",
    0x12: "CKR_ATTRIBUTE_TYPE_INVALID",
    0x13: "CKR_ATTRIBUTE_VALUE_INVALID",
    0x30: "CKR_DEVICE_ERROR",
    0x32: "CKR_DEVICE_REMOVED",
    0x54: "CKR_FUNCTION_NOT_SUPPORTED",
    0x70: "CKR_MECHANISM_INVALID",
    0x71: "CKR_MECHANISM_PARAM_INVALID",
    0xA0: "CKR_PIN_INCORRECT",
    0xA1: "CKR_PIN_INVALID",
    0xA2: "CKR_PIN_LEN_RANGE",
    0xA3: "CKR_PIN_EXPIRED",
    0xA4: "CKR_PIN_LOCKED",
    0xD0: "CKR_TEMPLATE_INCOMPLETE",
    0xD1: "CKR_TEMPLATE_INCONSISTENT",
    0xE0: "CKR_TOKEN_NOT_PRESENT",
    0xE1: "CKR_TOKEN_NOT_RECOGNIZED",
    0xE2: "CKR_TOKEN_WRITE_PROTECTED",
    0x102: "CKR_USER_PIN_NOT_INITIALIZED",
}
PIN_INCORRECT, PIN_LOCKED = 0xA0, 0xA4

# Flags of a token.
USER_PIN_INITIALIZED, TOKEN_INITIALIZED = 0x8, 0x400
COUNT_LOW = 0x10000
PIN_FLAGS = {
    COUNT_LOW: "CKF_USER_PIN_COUNT_LOW",
    0x20000: "CKF_USER_PIN_FINAL_TRY",
    0x40000: "CKF_USER_PIN_LOCKED",
    0x80000: "CKF_USER_PIN_TO_BE_CHANGED",
}

# Attributes, and what their values are.
CLASS, TOKEN, PRIVATE, LABEL, VALUE = 0x0, 0x1, 0x2, 0x3, 0x11
KEY_TYPE, ID, SENSITIVE, ENCRYPT, DECRYPT, DERIVE = 0x100, 0x102, 0x103, 0x104, 0x105, 0x10C
SIGN, UNWRAP, WRAP, MODULUS, MODULUS_BITS, PUBLIC_EXPONENT = 0x108, 0x107, 0x106, 0x120, 0x121, 0x122
VALUE_LEN, EXTRACTABLE, LOCAL, NEVER_EXTRACTABLE, ALWAYS_SENSITIVE = 0x161, 0x162, 0x163, 0x164, 0x165
EC_PARAMS, EC_POINT = 0x180, 0x181
PUBLIC_KEY, PRIVATE_KEY, SECRET_KEY = 0x2, 0x3, 0x4
RSA, EC, GENERIC_SECRET = 0x0, 0x3, 0x10
RSA_KEY_PAIR_GEN, RSA_PKCS, EC_KEY_PAIR_GEN, ECDSA, ECDH1_DERIVE, KDF_NULL = (
    0x0,
    0x1,
    0x1040,
    0x1041,
    0x1050,
    0x1,
)
P_384 = bytes.fromhex("06052b81040022")  # the curve's object identifier, as EC_PARAMS has it

READ_WRITE, SERIAL = 0x2, 0x4
SECURITY_OFFICER, USER = 0, 1
UNAVAILABLE = c_ulong(-1).value
MAX_PIN_LENGTH, MIN_PIN_LENGTH = 4, 5  # places in a token's limits

Template = Mapping[int, bool | int | bytes]


class Error(Exception):
    """A function of the module returned an error code (not CKR_OK)."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} returned {RETURNED.get(code, hex(code))}")
        self.code = code

    @property
    def gone(self) -> bool:
        """The HSM or the connection to it failed during a call."""
        return self.code in {0x30, 0x32, 0xE0}


class Info(ctypes.Structure):
    _fields_ = (
        ("cryptoki", c_ubyte * 2),
        ("manufacturer", c_char * 32),
        ("flags", c_ulong),
        ("description", c_char * 32),
        ("version", c_ubyte * 2),
    )


class TokenInfo(ctypes.Structure):
    _fields_ = (
        ("label", c_char * 32),
        ("manufacturer", c_char * 32),
        ("model", c_char * 16),
        ("serial", c_char * 16),
        ("flags", c_ulong),
        ("limits", c_ulong * 10),
        ("versions", c_ubyte * 4),
        ("time", c_char * 16),
    )


class Attribute(ctypes.Structure):
    _fields_ = (("kind", c_ulong), ("value", c_void_p), ("length", c_ulong))


class Mechanism(ctypes.Structure):
    _fields_ = (("kind", c_ulong), ("parameter", c_void_p), ("length", c_ulong))


class EcdhParameters(ctypes.Structure):
    _fields_ = (
        ("kdf", c_ulong),
        ("shared_length", c_ulong),
        ("shared", c_void_p),
        ("public_length", c_ulong),
        ("public", c_void_p),
    )


class FunctionList(ctypes.Structure):
    _fields_ = (("version", c_ubyte * 2), ("functions", c_void_p * 68))


@dataclass(frozen=True)
class Token:
    """A token's public information, read without a login."""

    slot: int
    label: str
    manufacturer: str
    model: str
    serial: str
    flags: int
    pin_lengths: tuple[int, int] = (0, UNAVAILABLE)

    @property
    def initialised(self) -> bool:
        return bool(self.flags & TOKEN_INITIALIZED)

    @property
    def pin_flags(self) -> list[str]:
        """Names of the token's flags that warn of a locked PIN."""
        return [name for flag, name in PIN_FLAGS.items() if self.flags & flag]


def text(padded: bytes) -> str:
    return padded.decode(errors="replace").rstrip(" \0")


def attributes(template: Template) -> tuple[Any, list[Any]]:
    """A CK_ATTRIBUTE template, and the values it points to."""
    values: list[Any] = []
    array = (Attribute * len(template))()
    for entry, (kind, value) in zip(array, template.items(), strict=True):
        # bool before int, since it is one
        if isinstance(value, bool):
            held: Any = c_ubyte(value)
        elif isinstance(value, int):
            held = c_ulong(value)
        else:
            held = ctypes.create_string_buffer(value, len(value))
        values.append(held)
        entry.kind, entry.value, entry.length = kind, ctypes.addressof(held), ctypes.sizeof(held)
    return array, values


class Module:
    """A PKCS#11 module, loaded and initialised. It is never finalised: the process ends instead."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the library cannot be loaded, Error if it cannot be initialised."""
        library = ctypes.CDLL(path)
        listed = POINTER(FunctionList)()
        code = library.C_GetFunctionList(byref(listed))
        if code != 0:
            raise Error("C_GetFunctionList", code)
        prototype = ctypes.CFUNCTYPE(c_ulong)  # arguments are given by type, below
        self._functions = {
            name: prototype(listed.contents.functions[index]) for name, index in FUNCTIONS.items()
        }
        self._call("C_Initialize", None)

    def _call(self, function: str, *words: Any) -> None:
        code = self._functions[function](*words)
        if code != 0:
            raise Error(function, code)

    def manufacturer(self) -> str:
        info = Info()
        self._call("C_GetInfo", byref(info))
        return text(info.manufacturer)

    def tokens(self) -> list[Token]:
        """All tokens, including those without a label."""
        count = c_ulong()
        self._call("C_GetSlotList", c_ubyte(1), None, byref(count))
        slots = (c_ulong * count.value)()
        self._call("C_GetSlotList", c_ubyte(1), slots, byref(count))
        tokens = []
        for slot in slots[: count.value]:
            info = TokenInfo()
            self._call("C_GetTokenInfo", c_ulong(slot), byref(info))
            # A field of characters ends for ctypes at the first zero; PKCS#11 pads by blanks, so nothing is lost.
            label, manufacturer = text(info.label), text(info.manufacturer)
            lengths = (info.limits[MIN_PIN_LENGTH], info.limits[MAX_PIN_LENGTH])
            tokens.append(
                Token(slot, label, manufacturer, text(info.model), text(info.serial), info.flags, lengths)
            )
        return tokens

    def initialise(self, slot: int, officer_pin: bytes, label: str) -> None:
        """Initialise the token in a slot, which destroys its contents."""
        padded = label.encode().ljust(32)
        self._call("C_InitToken", c_ulong(slot), officer_pin, c_ulong(len(officer_pin)), padded)

    @contextlib.contextmanager
    def session(self, slot: int, writes: bool = False) -> Iterator[Session]:
        handle = c_ulong()
        flags = c_ulong(SERIAL | (READ_WRITE if writes else 0))
        self._call("C_OpenSession", c_ulong(slot), flags, None, None, byref(handle))
        try:
            yield Session(self._call, handle)
        finally:
            with contextlib.suppress(Error):
                self._call("C_CloseSession", handle)


class Session:
    """A session with one token."""

    def __init__(self, call: Any, handle: c_ulong) -> None:
        self._call, self._handle = call, handle

    def login(self, pin: bytes, who: int = USER) -> None:
        self._call("C_Login", self._handle, c_ulong(who), pin, c_ulong(len(pin)))

    def set_user_pin(self, pin: bytes) -> None:
        """Set the user PIN, logged in as security officer."""
        self._call("C_InitPIN", self._handle, pin, c_ulong(len(pin)))

    def change_pin(self, old: bytes, new: bytes) -> None:
        """Change the PIN of the logged-in user; the token requires the old PIN again."""
        self._call("C_SetPIN", self._handle, old, c_ulong(len(old)), new, c_ulong(len(new)))

    def find(self, template: Template) -> list[int]:
        array, _values = attributes(template)
        self._call("C_FindObjectsInit", self._handle, array, c_ulong(len(template)))
        handles, count = (c_ulong * 64)(), c_ulong()
        try:
            self._call("C_FindObjects", self._handle, handles, c_ulong(64), byref(count))
        finally:
            self._call("C_FindObjectsFinal", self._handle)
        return list(handles[: count.value])

    def destroy(self, key: int) -> None:
        self._call("C_DestroyObject", self._handle, c_ulong(key))

    def read(self, key: int, kind: int) -> bytes:
        """An attribute's value; Error if the token does not reveal it."""
        template = (Attribute * 1)()
        template[0].kind = kind
        self._call("C_GetAttributeValue", self._handle, c_ulong(key), template, c_ulong(1))
        if template[0].length == UNAVAILABLE:
            raise Error("C_GetAttributeValue", 0x12)
        value = ctypes.create_string_buffer(template[0].length)
        template[0].value = ctypes.addressof(value)
        self._call("C_GetAttributeValue", self._handle, c_ulong(key), template, c_ulong(1))
        return value.raw[: template[0].length]

    def is_set(self, key: int, kind: int) -> bool:
        """A boolean attribute; False if the token does not support it."""
        try:
            return self.read(key, kind) not in {b"", b"\0"}
        except Error:
            return False

    def generate(self, mechanism: int, public: Template, private: Template) -> tuple[int, int]:
        """Generate a key pair in the token; returns the handles of the public and the private key."""
        how = Mechanism(mechanism, None, 0)
        first, _public_values = attributes(public)
        second, _private_values = attributes(private)
        handles = (c_ulong(), c_ulong())
        self._call(
            "C_GenerateKeyPair",
            self._handle,
            byref(how),
            first,
            c_ulong(len(public)),
            second,
            c_ulong(len(private)),
            byref(handles[0]),
            byref(handles[1]),
        )
        return handles[0].value, handles[1].value

    def derive(self, private: int, point: bytes, size: int) -> bytes:
        """ECDH of a key in the token with a public point, as systemd-cryptsetup does to open a volume."""
        held = ctypes.create_string_buffer(point, len(point))
        parameters = EcdhParameters(KDF_NULL, 0, None, len(point), ctypes.addressof(held))
        how = Mechanism(ECDH1_DERIVE, ctypes.addressof(parameters), ctypes.sizeof(parameters))
        template, _values = attributes(
            {
                CLASS: SECRET_KEY,
                KEY_TYPE: GENERIC_SECRET,
                SENSITIVE: False,
                EXTRACTABLE: True,
                VALUE_LEN: size,
            }
        )
        handle = c_ulong()
        self._call(
            "C_DeriveKey", self._handle, byref(how), c_ulong(private), template, c_ulong(5), byref(handle)
        )
        try:
            return self.read(handle.value, VALUE)
        finally:
            self.destroy(handle.value)

    def decrypt(self, private: int, block: bytes) -> bytes:
        """RSA decryption with PKCS#1 v1.5 padding, as in systemd 257."""
        how = Mechanism(RSA_PKCS, None, 0)
        self._call("C_DecryptInit", self._handle, byref(how), c_ulong(private))
        out = ctypes.create_string_buffer(len(block))
        size = c_ulong(len(block))
        self._call("C_Decrypt", self._handle, block, c_ulong(len(block)), out, byref(size))
        return out.raw[: size.value]

    def sign(self, private: int, digest: bytes, size: int) -> bytes:
        """ECDSA signature of a digest: r and s, each half of SIZE bytes."""
        how = Mechanism(ECDSA, None, 0)
        self._call("C_SignInit", self._handle, byref(how), c_ulong(private))
        out, length = ctypes.create_string_buffer(size), c_ulong(size)
        self._call("C_Sign", self._handle, digest, c_ulong(len(digest)), out, byref(length))
        return out.raw[: length.value]


def new_id() -> bytes:
    """A random CKA_ID for a new key pair."""
    return secrets.token_bytes(8)
