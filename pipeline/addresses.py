"""Which IP addresses are public: a URL from a stranger may lead to these and to no other.

Knows nothing of names, URLs or connections. ipaddress's is_global alone does not do: on Python 3.11.7 it holds for
64:ff9b::7f00:1 (127.0.0.1 behind NAT64), 2002:7f00:1:: (6to4), fec0::1 (site-local), ff02::1 and 192.0.0.8.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

IPAddress = IPv4Address | IPv6Address

# https://www.iana.org/assignments/iana-ipv4-special-registry, without the blocks that are globally reachable
NOT_PUBLIC_IPV4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # Linux takes it for this very host
            "10.0.0.0/8",
            "100.64.0.0/10",  # a provider's customers; cloud services, too
            "127.0.0.0/8",
            "168.63.129.16/32",  # looks public, but is Azure's own service inside each of its machines
            "169.254.0.0/16",  # link-local, where clouds keep a machine's credentials
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",
        ),
    )
)
PUBLIC_IPV6 = IPv6Network("2000::/3")  # what is given out at all; local, private and multicast addresses lie outside
NOT_PUBLIC_IPV6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocols: Teredo, which embeds IPv4, ORCHID, benchmarks
            "2001:db8::/32",
            "3fff::/20",
        ),
    )
)
# Where an IPv4 address stands inside an IPv6 address: (network, how many bits follow it).
EMBEDDED_IPV4 = (
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64; a network's own prefix for it cannot be known here
    (IPv6Network("2002::/16"), 80),  # 6to4
)


def is_public(address: IPAddress) -> bool:
    """Say whether everybody on the internet reaches the same host there. An address that stands for an IPv4 address
    is as public as that one; an IPv6 address with a zone is not."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in NOT_PUBLIC_IPV4)
    if address.scope_id is not None:
        return False
    for network, num_bits_after in EMBEDDED_IPV4:
        if address in network:
            return is_public(IPv4Address(int(address) >> num_bits_after & 0xFFFF_FFFF))
    return address in PUBLIC_IPV6 and not any(address in network for network in NOT_PUBLIC_IPV6)


def is_link_local(address: IPAddress) -> bool:
    """Say whether the address, or the IPv4 address mapped into it, means the neighbours on one cable only."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_link_local


def parse_address(text: str) -> IPAddress | None:
    """Read an address in its plain spelling; None if it is a name, or spelled otherwise (127.1, 0x7f.1, 017.0.0.1)."""
    try:
        return ip_address(text)
    except ValueError:
        return None
