"""Reading URLs from strangers."""

import pytest

from pipeline.addresses import is_public
from pipeline.urls import MAX_URL_LENGTH, UrlRefused, UrlRules, check_url, parse_hosts, shown


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM:443/A?b=C#d", "https://example.com/A?b=C"),
        ("  http://example.com:8080/x  ", "http://example.com:8080/x"),
        ("http://example.com:/x", "http://example.com/x"),
        ("http://example.com./x", "http://example.com/x"),
        ("http://my_bucket.example.com/x", "http://my_bucket.example.com/x"),
        ("http://bücher.example/ä b?ü=%20", "http://xn--bcher-kva.example/%C3%A4%20b?%C3%BC=%20"),
        ("http://faß。example/", "http://xn--fa-hia.example/"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://８.８.８.８/", "http://8.8.8.8/"),
        ("https://[2606:4700:4700:0::1111]/", "https://[2606:4700:4700::1111]/"),
        ("https://[2606:4700:4700::1111]:8443/", "https://[2606:4700:4700::1111]:8443/"),
        ("http://example.com?x", "http://example.com/?x"),
        ('http://example.com/"<{x}>"|?y=^`', "http://example.com/%22%3C%7Bx%7D%3E%22|?y=%5E%60"),
        ("http://example.com/\ud800", "http://example.com/?"),
    ],
)
def test_a_url_is_read_once_into_what_is_sent(text: str, read: str) -> None:
    assert str(check_url(text, UrlRules())).replace("%3F", "?") == read


@pytest.mark.parametrize(
    ("location", "read"),
    [
        ("/b", "https://example.com/b"),
        ("b?c", "https://example.com/a/b?c"),
        ("//other.example/b", "https://other.example/b"),
        ("http://other.example:8080", "http://other.example:8080/"),
        ("?q", "https://example.com/a/x?q"),
    ],
)
def test_a_redirect_is_read_relative_to_where_it_came_from(location: str, read: str) -> None:
    base = check_url("https://example.com/a/x", UrlRules())

    assert str(check_url(location, UrlRules(), base=base)) == read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((f"http://{spelling}/", "unusual spelling") for spelling in ("127.1", "0x7f.1", "2130706433", "0177.0.0.1")),
        *(
            (f"http://{spelling}/", "unusual spelling")
            for spelling in ("8.8.8", "08.8.8.8", "１.1", "a.0x", "256.1.1.1")
        ),
        *((f"http://{user}@example.com/", "user name or password") for user in ("", ":", "me", "me:secret")),
        *((f"http://exam{char}ple.com/", "control character") for char in "\t\n\r\0\x1f\x7f\\"),
        *(
            (f"http://[{text}]/", "IPv6|cannot be read")
            for text in ("127.0.0.1", "fe80::1%25eth0", "fe80::1%eth0", "::g", "")
        ),
        *((f"{scheme}://example.com/", "only http") for scheme in ("ftp", "file", "gopher", "ws", "httpx")),
        ("http://example.com:22/", "port 22 is not allowed. Use one of 80, 443, 8080, 8443"),
        ("http://localhost%00.example.com/", "not a valid name"),
        ("http://xn--a.\u00e9\u200b\u0378/", "international name"),
    ],
)
def test_a_refusal_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(UrlRefused, match=words):
        check_url(text, UrlRules())


def test_a_longer_url_than_any_browser_sends_is_refused() -> None:
    with pytest.raises(UrlRefused, match="longer than"):
        check_url("http://example.com/" + "x" * MAX_URL_LENGTH, UrlRules())


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://example.com/a.mp4?token=secret#secret", "https://example.com/a.mp4?…"),
        ("https://example.com/a.mp4", "https://example.com/a.mp4"),
        ("http://user:secret@example.com/a", "http://example.com/a"),
        ("http://user:sec?ret@example.com/a", "http://example.com/a"),
        ("//user:secret@example.com", "//example.com"),
        ("http://example.com/\r\nfake log line", "http://example.com/fake log line"),
        ("http://example.com/" + "x" * 500, "http://example.com/" + "x" * 181 + "…"),
    ],
)
def test_what_may_be_secret_is_not_shown(url: str, text: str) -> None:
    assert shown(url) == text


def test_a_host_on_the_list_may_have_any_port_and_a_private_address() -> None:
    rules = UrlRules(allow_private_urls=frozenset({"10.0.0.5", "169.254.169.254", "::1"}))

    assert check_url("http://10.0.0.5:5000/", rules).port == 5000
    assert check_url("http://[::1]:5000/", rules).host == "::1"
    assert check_url("http://169.254.169.254/", rules).host == "169.254.169.254"
    for url in ("http://10.0.0.6/", "http://8.8.8.8:5000/", "http://127.0.0.1/"):
        with pytest.raises(UrlRefused):
            check_url(url, rules)


def test_the_list_is_read_from_a_setting() -> None:
    assert parse_hosts(" NAS.local, 10.0.0.5,,[::1]") == {"nas.local", "10.0.0.5", "::1"}
    assert parse_hosts("") == frozenset()


def test_all_hosts_on_the_list_still_do_not_mean_the_metadata_service() -> None:
    rules = UrlRules(allow_private_urls=frozenset("*"))

    assert check_url("http://10.0.0.5:5000/", rules)
    for url in ("http://169.254.169.254/", "http://[fe80::1]/", "http://[::ffff:169.254.169.254]/"):
        with pytest.raises(UrlRefused, match="not public"):
            check_url(url, rules)


def test_a_refusal_quotes_no_password() -> None:
    for url in ("http://me:secret@example.com/", "http://me:secret℀@example.com/", "http://[me:secret]@x/"):
        with pytest.raises(UrlRefused) as refusal:
            check_url(url, UrlRules(), is_public=is_public)
        assert "secret" not in str(refusal.value) + str(refusal.value.__cause__)
