"""S10: where webhooks may not go, told from the URL or from the addresses of its name."""

import time
from ipaddress import ip_network

import pytest

from service.webhook_addresses import Policy, Refused, Target, addresses, parse

PUBLIC = "93.184.216.34"
NOT_PUBLIC = {
    "loopback": "127.0.0.1", "loopback, IPv6": "::1", "any": "0.0.0.0",  # noqa: S104
    "any, IPv6": "::", "private": "10.0.0.5",
    "private, 172": "172.16.0.1", "private, 192": "192.168.1.1", "metadata": "169.254.169.254",
    "metadata, IPv6": "fd00:ec2::254", "metadata, Alibaba": "100.100.100.200", "metadata, Azure": "168.63.129.16",
    "shared": "100.64.0.1",
    "link-local": "fe80::1", "link-local with a zone": "fe80::1%eth0", "unique local": "fc00::1",
    "IPv4-mapped": "::ffff:10.0.0.1", "IPv4-mapped public": f"::ffff:{PUBLIC}", "IPv4-compatible": "::127.0.0.1",
    "NAT64": "64:ff9b::a00:1", "NAT64, local": "64:ff9b:1::a00:1", "6to4": "2002:a00:1::", "6to4 relay": "192.88.99.1",
    "Teredo": "2001:0:a00:1::", "multicast": "224.0.0.1", "multicast, IPv6": "ff02::1", "broadcast": "255.255.255.255",
    "reserved": "240.0.0.1", "documentation": "192.0.2.1", "documentation, IPv6": "2001:db8::1",
    "documentation, new": "3fff::1", "benchmarks": "198.18.0.1", "site-local": "fec0::1",
}  # fmt: skip
URLS = {
    "no scheme": ("example.com/x", "https"), "http": ("http://example.com/", "https"),
    "ftp": ("ftp://example.com/", "https"), "file": ("file:///etc/passwd", "https"),
    "gopher": ("gopher://example.com:443/_x", "https"), "a user": ("https://user@example.com/", "user"),
    "a password": ("https://u:p@example.com/", "user"), "an empty user": ("https://@example.com/", "user"),
    "another host before @": ("https://example.com@10.0.0.1/", "user"), "port 22": ("https://example.com:22/", "port"),
    "port 25": ("https://example.com:25/", "port"), "port 0": ("https://example.com:0/", "port"),
    "port 99999": ("https://example.com:99999/", "URL"), "a decimal number": ("https://2130706433/", "host"),
    "hexadecimal": ("https://0x7f.1/", "host"), "one hexadecimal number": ("https://0x7f000001/", "host"),
    "octal": ("https://0177.0.0.1/", "host"), "few parts": ("https://127.1/", "host"), "empty": ("", "characters"),
    "no host": ("https:///x", "host"), "a bare name": ("https://.", "host"), "a backslash": ("https://a\\@b/", "char"),
    "a space": ("https://exa mple.com/", "characters"), "a line break": ("https://example.com/\r\nx", "characters"),
    "a fragment": ("https://example.com/#x", "characters"), "not ASCII": ("https://ex\u00e4mple.com/", "characters"),
    "full-width digits": ("https://\uff11\uff12\uff17.0.0.1/", "characters"),
    "half a bracket": ("https://[::1/", "URL"),
    "a zone": ("https://[fe80::1%25eth0]/", "host"), "2 KB": ("https://example.com/" + "x" * 2000, "2000"),
    "a trailing dot": ("https://localhost./", "host"),
}  # fmt: skip


def stands_for(*found: str) -> Policy:
    return Policy(lookup=lambda _host, _port: list(found))


@pytest.mark.parametrize("name", URLS)
def test_s10_urls_that_are_refused(name: str) -> None:
    url, reason = URLS[name]
    with pytest.raises(Refused, match=reason):
        addresses(parse(url, stands_for(PUBLIC)), stands_for(PUBLIC), 5)


@pytest.mark.parametrize("name", NOT_PUBLIC)
def test_s10_addresses_that_are_refused(name: str) -> None:
    target = Target("https", "example.com", 443, "/")
    for found in ([NOT_PUBLIC[name]], [PUBLIC, NOT_PUBLIC[name]], [NOT_PUBLIC[name], PUBLIC]):
        with pytest.raises(Refused, match="not public") as refusal:
            addresses(target, stands_for(*found), 5)
        assert NOT_PUBLIC[name] not in str(refusal.value)


@pytest.mark.parametrize("host", ["169.254.169.254", "127.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "localhost"])
def test_s10_by_the_real_resolver(host: str) -> None:
    with pytest.raises(Refused, match="not public"):
        addresses(parse(f"https://{host}/latest/meta-data", Policy()), Policy(), 5)


def test_public_addresses_and_what_is_kept_of_a_url() -> None:
    found = [PUBLIC, "2606:2800:220:1:248:1893:25c8:1946"]
    for url, kept in {
        "HTTPS://Example.COM": "https://example.com/",
        "https://example.com:443/a?b=c": "https://example.com/a?b=c",
        "https://example.com:8443/?token=x": "https://example.com:8443/?token=x",
        "https://93.184.216.34/": "https://93.184.216.34/",
        "https://[2606:2800:220:1::1]:9000/x": "https://[2606:2800:220:1::1]:9000/x",
    }.items():
        target = parse(url, stands_for(*found))
        assert str(target) == kept
        assert addresses(target, stands_for(*found), 5) == found


def test_what_the_operator_allows_and_nothing_beside_it() -> None:
    policy = Policy(True, [ip_network("10.1.2.0/24")], lambda host, _: [host])
    assert addresses(parse("http://10.1.2.3:8080/", policy), policy, 5) == ["10.1.2.3"]
    with pytest.raises(Refused, match="not public"):
        addresses(parse("http://10.1.3.3/", policy), policy, 5)


def test_a_resolver_that_never_answers_holds_up_nobody() -> None:
    def never(_host: str, _port: int) -> list[str]:
        time.sleep(2)
        return [PUBLIC]

    began = time.monotonic()
    with pytest.raises(Refused, match="in time"):
        addresses(Target("https", "example.com", 443, "/"), Policy(lookup=never), 0.1)
    assert time.monotonic() - began < 1


def test_a_name_without_an_address() -> None:
    def unknown(_host: str, _port: int) -> list[str]:
        raise OSError("no such name")

    for policy in (Policy(lookup=unknown), stands_for()):
        with pytest.raises(Refused, match="no address"):
            addresses(Target("https", "nowhere.example", 443, "/"), policy, 5)
