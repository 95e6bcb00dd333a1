"""The policies as text. That browsers show all that they guard: test_page.py."""

import base64
import hashlib

from jobs import csp

SCRIPT = b"window.config = {};"
HTML = (
    b'<head><script src="a.js"></script><script type="module" src="b.js"></script><script>%s</script></head>' % SCRIPT
)


def test_a_script_that_stands_in_a_page_runs_by_its_hash() -> None:
    digest = base64.b64encode(hashlib.sha256(SCRIPT).digest()).decode()

    for policy in (csp.for_page(HTML), csp.for_docs(HTML)):
        assert policy.count("sha256-") == 1 and f"'sha256-{digest}'" in policy
        assert "script-src 'self'" in policy and "http" not in policy


def test_scripts_of_several_lines_and_with_attributes_have_their_hashes_too() -> None:
    assert csp.for_page(b"<script>\n1\n</script>text<script data-x>2</script>").count("sha256-") == 2


def test_no_policy_lets_markup_run_scripts_or_send_forms() -> None:
    for policy in (csp.ANSWER, csp.MEDIA, csp.for_page(HTML), csp.for_docs(HTML)):
        rules = {name: rest for name, _, rest in (rule.strip().partition(" ") for rule in policy.split(";"))}
        assert rules["default-src"] == rules["form-action"] == "'none'"
        assert "'unsafe-inline'" not in rules.get("script-src", "")
        assert rules["base-uri"] in ("'none'", "'self'")
