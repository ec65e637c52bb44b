"""For all tests: the user's Ray token is used, as `deltal` does for a local run; Ray reads this when it is imported."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
