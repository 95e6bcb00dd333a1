"""Public or not: every block with a purpose of its own, and every way to put an IPv4 address into an IPv6 one."""

from ipaddress import ip_address

import pytest

from pipeline.addresses import is_link_local, is_public, parse_address

PUBLIC = """
1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.0 172.15.255.255 172.32.0.0 192.0.1.0 198.17.255.255
198.20.0.0 223.255.255.255 2606:4700:4700::1111 2a00:1450:4001:82a::200e 2400:cb00::1 ::ffff:8.8.8.8 64:ff9b::808:808
2002:808:808::1
"""
NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.255.255.254
168.63.129.16 169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192
192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255
240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::8.8.8.8 100::1 64:ff9b:1::808:808 2001::1 2001:0:808:808::1 2001:10::1
2001:20::1 2001:db8::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1%eth0 fec0::1
ff02::1 ff0e::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:224.0.0.1 ::ffff:0:127.0.0.1
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b::a00:1 2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe:: 2002:c0a8:1::1
"""


@pytest.mark.parametrize("text", PUBLIC.split())
def test_an_address_that_everybody_reaches_is_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC.split())
def test_an_address_with_a_purpose_of_its_own_is_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


def test_the_metadata_service_is_link_local_even_when_mapped() -> None:
    assert is_link_local(ip_address("169.254.169.254")) and is_link_local(ip_address("::ffff:169.254.169.254"))
    assert not is_link_local(ip_address("10.0.0.1")) and not is_link_local(ip_address("::1"))


@pytest.mark.parametrize("text", ["127.1", "0x7f.0.0.1", "0177.0.0.1", "2130706433", "1.2.3.4.", "example.com", ""])
def test_only_plain_spellings_are_read(text: str) -> None:
    assert parse_address(text) is None
