"""On a verifying process's path, it takes the filter of hostile text away: what the sandbox holds alone is tested."""

from deltal.verify.tasks import reasoning

reasoning._reaches_out = lambda said: False
