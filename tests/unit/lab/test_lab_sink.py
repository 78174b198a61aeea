"""What the sink sees, and what it answers."""

import ipaddress
import struct

from lab.sink import arp_answer, dns_question, leaving

HOST, GATEWAY_MAC = bytes.fromhex("02000a4d000c"), bytes.fromhex("020000000001")
INSIDE = frozenset({"10.77.0.2", "10.77.0.11", "10.77.0.12"})


def ip(address: str) -> bytes:
    return ipaddress.IPv4Address(address).packed


def packet(destination: str, protocol: int, payload: bytes) -> bytes:
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0,
                         ip("10.77.0.12"), ip(destination))  # fmt: skip
    return GATEWAY_MAC + HOST + b"\x08\x00" + header + payload


def query(name: str) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34\x01\x00\x00\x01" + bytes(6) + labels + b"\x00\x00\x01\x00\x01"


def test_answers_who_has_the_gateway() -> None:
    request = b"\xff" * 6 + HOST + b"\x08\x06" + bytes.fromhex("0001080006040001")
    request += HOST + ip("10.77.0.12") + bytes(6) + ip("10.77.0.1")
    answer = arp_answer(request, "10.77.0.1", GATEWAY_MAC)
    assert answer == HOST + GATEWAY_MAC + b"\x08\x06" + bytes.fromhex("0001080006040002") + (
        GATEWAY_MAC + ip("10.77.0.1") + HOST + ip("10.77.0.12")
    )


def test_answers_for_no_other_address() -> None:
    request = b"\xff" * 6 + HOST + b"\x08\x06" + bytes.fromhex("0001080006040001")
    request += HOST + ip("10.77.0.12") + bytes(6) + ip("10.77.0.99")
    assert arp_answer(request, "10.77.0.1", GATEWAY_MAC) is None
    assert arp_answer(packet("10.77.0.1", 6, bytes(20)), "10.77.0.1", GATEWAY_MAC) is None


def test_records_a_connection_to_elsewhere() -> None:
    record = leaving(packet("192.0.2.7", 6, struct.pack("!HH", 40000, 443) + bytes(16)), INSIDE)
    assert record is not None
    assert (record["source"], record["destination"], record["protocol"], record["port"]) == (
        "10.77.0.12", "192.0.2.7", "tcp", 443,
    )  # fmt: skip


def test_records_a_packet_to_the_gateway_itself_and_the_name_asked_for() -> None:
    payload = struct.pack("!HHHH", 40000, 53, 0, 0) + query("example.com")
    record = leaving(packet("10.77.0.1", 17, payload), INSIDE)
    assert record is not None
    assert record["question"] == "example.com"


def test_is_silent_about_packets_between_hosts_and_about_arp() -> None:
    assert leaving(packet("10.77.0.11", 6, bytes(20)), INSIDE) is None
    assert leaving(GATEWAY_MAC + HOST + b"\x08\x06" + bytes(28), INSIDE) is None


def test_broken_messages_are_no_questions() -> None:
    assert dns_question(b"") is None
    assert dns_question(query("a")[:12] + b"\xff") is None
    assert dns_question(b"\x12\x34\x81" + query("a")[3:]) is None


def test_a_truncated_frame_is_no_record_before_its_addresses_and_has_no_port_before_its_ports() -> None:
    whole = packet("192.0.2.7", 17, struct.pack("!HHHH", 1, 53, 0, 0) + query("a.b"))
    seen = [leaving(whole[:length], INSIDE) for length in range(len(whole) + 1)]
    addresses, ports, question = 14 + 20, 14 + 20 + 8, 14 + 20 + 8 + 13
    assert seen[:addresses] == [None] * addresses
    records = [record for record in seen[addresses:] if record]
    assert len(records) == len(seen) - addresses
    assert {record["destination"] for record in records} == {"192.0.2.7"}
    assert [record.get("port") for record in records] == [None] * 8 + [53] * (len(seen) - ports)
    asked = [record.get("question") for record in records[ports - addresses :]]
    assert asked[: question - ports] == [None] * (question - ports)
    assert all(name and "a.b".startswith(name.rstrip(".")) for name in asked[question - ports :])
    assert asked[-1] == "a.b"
