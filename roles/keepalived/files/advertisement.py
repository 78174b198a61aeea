"""The first VRRP packet that leaves or reaches this host within 8 s, as `version SOURCE DESTINATION hops N router N`."""

import ipaddress
import socket
import time

VRRP = 112
link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
link.settimeout(8)
end = time.monotonic() + 8
while time.monotonic() < end:
    packet = link.recv(2048)
    if packet[0] >> 4 == 4 and packet[9] == VRRP:
        hops, source, destination, vrrp = (
            packet[8],
            packet[12:16],
            packet[16:20],
            packet[(packet[0] & 15) * 4 :],
        )
    elif packet[0] >> 4 == 6 and packet[6] == VRRP:
        hops, source, destination, vrrp = packet[7], packet[8:24], packet[24:40], packet[40:]
    else:
        continue
    ends = " ".join(str(ipaddress.ip_address(each)) for each in (source, destination))
    print(f"{vrrp[0] >> 4} {ends} hops {hops} router {vrrp[1]}")
    break
