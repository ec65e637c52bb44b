"""The live page: one self-contained HTML text and the content security policy that pins its script and style.

The page holds no facts of a run. Its script fetches /status.json every two seconds and writes every value with
textContent: whatever a run's data say, they cannot become markup. Behind a token the page asks for it and keeps it in
memory only.
"""

from __future__ import annotations

import base64
import hashlib

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
h1 { font-size: 1.3rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 500; color: #57606a; width: 14rem; vertical-align: top; }
th, td { border-bottom: 1px solid #d0d7de; padding: .25rem .5rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: 4rem; border-bottom: 1px solid #d0d7de; }
polyline { fill: none; stroke: #0969da; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
figure { margin: 1rem 0; } figcaption { color: #57606a; }
#note { color: #b35900; min-height: 1.5em; }
[hidden] { display: none; }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117; }
  th, figcaption { color: #9198a1; } th, td, svg { border-color: #30363d; }
}
"""

SCRIPT = """
"use strict";
const seen = {reward: [], accuracy: []};
let token = "", lastStep = null;
const at = (id) => document.getElementById(id);
const number = (value, digits) => typeof value === "number"
  ? value.toLocaleString("en", {maximumFractionDigits: digits ?? 3}) : (value ?? "–");
const pairs = (object) => Object.entries(object ?? {})
  .map(([key, value]) => key + " " + (value !== null && typeof value === "object" ? "(" + pairs(value) + ")"
    : number(value))).join(", ") || "–";
const time = (seconds) => typeof seconds === "number"
  ? Math.floor(seconds / 60) + " min " + Math.round(seconds % 60) + " s" : "–";

function rows(s) {
  return [
    ["state", s.state ?? "–"],
    ["step", number(s.step) + " of " + number(s.steps)],
    ["policy version", number(s.policy_version)],
    ["reward", number(s.reward)],
    ["accuracy", number(s.accuracy)],
    ["accuracy before, after", number(s.accuracy_before) + ", " + number(s.accuracy_after)],
    ["evaluation", s.evaluation ? number(s.evaluation.done) + " of " + number(s.evaluation.of) : "–"],
    ["response length", number(s.response_length, 1) + " tokens"],
    ["tokens a second", pairs(s.tokens_per_second)],
    ["staleness", pairs(s.staleness)],
    ["queues", pairs(s.queues)],
    ["workers", pairs(s.workers)],
    ["restarts", pairs(s.restarts)],
    ["ledger", pairs(s.ledger)],
    ["prompts skipped", number(s.prompts_skipped)],
    ["time left", time(s.seconds_left)],
    ["message", s.message ?? "–"],
  ];
}

function draw(id, values) {
  const known = values.filter((value) => typeof value === "number");
  if (known.length === 0) return;
  const low = Math.min(0, ...known), high = Math.max(1e-9, ...known);
  const points = known.map((value, i) =>
    (known.length === 1 ? 0 : 100 * i / (known.length - 1)).toFixed(2) + ","
    + (29 - 28 * (value - low) / (high - low)).toFixed(2));
  if (known.length === 1) points.push("100," + points[0].split(",")[1]);
  at(id).setAttribute("points", points.join(" "));
  at(id + "-now").textContent = number(known[known.length - 1]);
}

function show(status) {
  document.title = "deltal " + (status.name ?? "");
  at("name").textContent = status.name ?? "deltal";
  const cells = rows(status).map(([name, value]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th"), cell = document.createElement("td");
    head.textContent = name;
    cell.textContent = String(value);
    row.append(head, cell);
    return row;
  });
  at("facts").replaceChildren(...cells);
  if (status.step !== lastStep) {
    lastStep = status.step;
    for (const key of Object.keys(seen)) {
      seen[key].push(status[key]);
      if (seen[key].length > 1000) seen[key].shift();
      draw(key, seen[key]);
    }
  }
}

async function tick() {
  try {
    const headers = token ? {Authorization: "Bearer " + token} : {};
    const answer = await fetch("/status.json", {headers, cache: "no-store"});
    at("enter").hidden = answer.status !== 401;
    if (answer.ok) show(await answer.json());
    at("note").textContent = answer.ok ? "" : answer.status === 401 ? "This page needs the run's token."
      : "The run does not answer now (" + answer.status + ").";
  } catch {
    at("note").textContent = "No connection: the run has ended, or the network is down.";
  }
}

at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value;
  at("token").value = "";
  tick();
});
tick();
setInterval(tick, 2000);
"""

PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>deltal</title>
<style>{STYLE}</style>
</head>
<body>
<h1 id="name">deltal</h1>
<p id="note" role="status"></p>
<form id="enter" hidden>
<label>Token (DELTAL_TOKEN): <input id="token" type="password" autocomplete="off"></label> <button>show</button>
</form>
<table><tbody id="facts"></tbody></table>
<figure><figcaption>reward since this page was opened: <span id="reward-now">–</span></figcaption>
<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img"><polyline id="reward"/></svg></figure>
<figure><figcaption>accuracy since this page was opened: <span id="accuracy-now">–</span></figcaption>
<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img"><polyline id="accuracy"/></svg></figure>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _source(text: str) -> str:
    """The CSP source expression that allows exactly this inline text."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


SECURITY_HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            f"script-src {_source(SCRIPT)}",
            f"style-src {_source(STYLE)}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Sent with every answer: nothing but the page's own script and style runs, and only this server is asked."""
