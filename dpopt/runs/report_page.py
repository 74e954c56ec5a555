"""Style and script of the report, and the page around its parts. Nothing is loaded, and no other script may run."""

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --shade: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 36px 0 12px; }
h3 { font-size: 1.05rem; margin: 16px 0 8px; }
h4 { font-size: .95rem; margin: 14px 0 6px; }
p, li { max-width: 76ch; overflow-wrap: anywhere; }
.note { color: var(--soft); margin: 4px 0; font-size: .9rem; }
.warning { border-left: 4px solid #b35900; padding: 6px 12px; background: #fff8f0; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
.groups { width: 100%; font-variant-numeric: tabular-nums; }
.groups thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; overflow-wrap: normal; }
.card { width: 100%; }
.card th { font-weight: 600; width: 13em; }
figure { margin: 0; max-width: 720px; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 8px 0 0; padding: 0; list-style: none;
  font-size: .9rem; }
.legend li { display: flex; gap: 8px; align-items: baseline; }
.legend i { flex: none; width: 18px; height: 4px; border-radius: 2px; align-self: center; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; padding: 0 14px; }
details details { border-style: dashed; margin: 12px 0; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; overflow-wrap: anywhere; }
summary span { color: var(--soft); font-weight: 400; white-space: nowrap; }
pre { background: var(--shade); padding: 12px; overflow: auto; font-size: .82rem; line-height: 1.4; max-height: 30em; }
code { background: var(--shade); padding: 1px 4px; border-radius: 3px; font-size: .9em; }
@media (max-width: 640px) {
  .groups thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .groups, .groups tbody, .groups tr, .groups td, .groups th, .card, .card tbody, .card tr, .card td, .card th {
    display: block; width: auto; }
  .groups tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
  .groups td, .groups tbody th { border: 0; padding: 2px 0; }
  .groups td::before { content: attr(data-head) ": "; color: var(--soft); }
  .card th { border: 0; padding-bottom: 0; }
  svg text { font-size: 15px; }
}
"""

SCRIPT = """
"use strict";
const source = document.getElementById("curves");
if (source) {
  const data = JSON.parse(source.textContent);
  const svg = document.querySelector("svg"), line = document.getElementById("at");
  const title = document.getElementById("step"), values = document.querySelectorAll(".legend b");
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * data.width;
    let best = 0;
    data.x.forEach((at, i) => { best = Math.abs(at - x) < Math.abs(data.x[best] - x) ? i : best; });
    line.setAttribute("x1", data.x[best]);
    line.setAttribute("x2", data.x[best]);
    line.setAttribute("visibility", "visible");
    title.textContent = "At step " + data.steps[best] + ":";
    values.forEach((value, i) => { value.textContent = data.values[i][best]; });
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
}
"""


def page(title: str, body: str, script: str = SCRIPT) -> str:
    """Write a page that carries all it needs, can load nothing, and runs this script alone; empty for none."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'{allowed}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>{f"{chr(10)}<script>{script}</script>" if script else ""}
</body>
</html>
"""
