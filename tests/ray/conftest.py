"""These tests need the package ray, in an environment of its own: see the README. Elsewhere, they are left out."""

import os
import secrets
from importlib.util import find_spec

spec = find_spec("ray")  # this folder itself, where there is no such package
collect_ignore_glob = [] if spec and spec.origin else ["test_*.py"]

# As on a real cluster; read when ray is imported.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
