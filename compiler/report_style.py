"""The style sheet of the HTML report: light, dark, phone and paper.

Colours are variables with a light and a dark value; text has a contrast of at least 4.5 to
its ground in both. Blue and orange stay apart for the colour-blind, and no state is told by
colour alone. On a narrow screen a table becomes a list of cards, each cell under its
column's name. Only fonts that the device has; nothing is loaded.
"""

from __future__ import annotations

_LIGHT = """
--ground: #f5f6f8; --surface: #ffffff; --ink: #16202c; --muted: #566373; --line: #dde2e8;
--accent: #1f5fbf; --accent-soft: #6594d3; --good: #12695b; --good-soft: #e0f2ee;
--bad: #b3410a; --bad-soft: #fdebe0; --wait: #7a5600; --wait-soft: #fbf1d5;
"""
_DARK = """
--ground: #10151b; --surface: #19212a; --ink: #e7edf3; --muted: #9eacba; --line: #303b47;
--accent: #74aef7; --accent-soft: #4a78ad; --good: #6fd3bf; --good-soft: #16352f;
--bad: #ff9c66; --bad-soft: #40261a; --wait: #f0c75e; --wait-soft: #39301a;
"""
_BASE = """
*, *::before, *::after { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    Arial, sans-serif; -webkit-text-size-adjust: 100%; font-variant-numeric: tabular-nums; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 2px 0 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 24px 0 0; }
p { margin: 0 0 12px; max-width: 72ch; }
code { font: 0.88em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono",
  monospace; overflow-wrap: anywhere; }
.quiet { color: var(--muted); }
.rank { display: inline-block; min-width: 1.9em; color: var(--muted); }
.small { font-size: 14px; }
.over { color: var(--muted); font-size: 13px; font-weight: 600; letter-spacing: 0.04em;
  text-transform: uppercase; margin: 0; }
header .quiet { margin-bottom: 16px; }
section, .card, .note { background: var(--surface); border: 1px solid var(--line);
  border-radius: 12px; }
section { padding: 22px 24px 24px; margin-top: 20px; }
section > p:first-of-type { margin-bottom: 14px; }
"""
_PARTS = """
.state { display: inline-block; border-radius: 999px; padding: 2px 12px; font-size: 14px;
  font-weight: 600; white-space: nowrap; }
.card .state { padding: 0 9px; font-size: 12.5px; line-height: 1.5; margin-left: 4px; }
.verdict { font-size: 16px; padding: 6px 16px; white-space: normal; border-radius: 20px; }
.good { color: var(--good); background: var(--good-soft); }
.bad { color: var(--bad); background: var(--bad-soft); }
.wait { color: var(--wait); background: var(--wait-soft); }
.plain { color: var(--muted); background: var(--ground); }
header .plain { background: var(--surface); border: 1px solid var(--line); }
.note { background: var(--wait-soft); border-color: transparent; color: var(--wait);
  padding: 12px 18px; margin-top: 20px; font-size: 15px; }
.note p { margin: 0; max-width: none; }
.cards { display: grid; gap: 14px; margin-top: 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); }
.card { padding: 16px 20px 18px; }
.card .figure { font-size: 30px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.25;
  margin: 4px 0 2px; }
.card .none { color: var(--muted); font-size: 22px; font-weight: 500; line-height: 1.7; }
.card .worse { color: var(--bad); }
.card p { margin: 0; }
.pair { margin-top: 10px; display: grid; gap: 5px; }
.bar { height: 7px; border-radius: 2px; background: var(--accent); width: var(--share);
  min-width: 2px; }
.bar.first { background: var(--muted); }
.bar.low { background: var(--bad); }
.track { position: relative; background: var(--ground); border-radius: 2px; height: 8px;
  min-width: 90px; margin: 7px 0; }
.track .bar { height: 8px; }
.track i { position: absolute; left: var(--limit); top: -4px; width: 2px; height: 16px;
  background: var(--ink); }
.chart { display: block; width: 100%; height: auto; margin: 10px 0 4px; }
.chart.narrow { display: none; max-width: 460px; margin-inline: auto; }
.chart text { font-family: inherit; paint-order: stroke; stroke: var(--surface); stroke-width: 3px;
  stroke-linejoin: round; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; margin-top: 10px; }
th { text-align: left; color: var(--muted); font-weight: 600; font-size: 13px;
  border-bottom: 1px solid var(--line); padding: 6px 14px 6px 0; vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); padding: 8px 14px 8px 0; vertical-align: top; }
tr:last-child td { border-bottom: 0; padding-bottom: 2px; }
th:last-child, td:last-child { padding-right: 0; }
.right { text-align: right; white-space: nowrap; }
td.wide { min-width: 150px; }
td.lead b { white-space: nowrap; }
.kind { color: var(--muted); font-style: normal; font-size: 14px; }
td .quiet { display: block; font-size: 13.5px; }
section > p:last-child { margin-bottom: 0; }
table + details { margin-top: 12px; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:last-child { padding-bottom: 0; }
summary { cursor: pointer; font-weight: 500; padding: 2px 0; }
summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
summary .state { margin-left: 6px; padding: 0 10px; }
details ul { margin: 8px 0 4px; padding-left: 20px; columns: 26em 2; column-gap: 32px; }
ul { margin: 8px 0 0; padding-left: 20px; }
li { margin: 3px 0; break-inside: avoid; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(9em, max-content) 1fr; gap: 8px 24px;
  margin: 12px 0 0; font-size: 15px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 24px; font-size: 13.5px; color: var(--muted); }
"""
_NARROW = """
@media screen and (max-width: 720px) {
  main { padding: 24px 14px 40px; }
  h1 { font-size: 27px; }
  section { padding: 18px 16px 18px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(min(150px, 100%), 1fr)); gap: 10px; }
  .card { padding: 13px 15px 15px; }
  .card .figure { font-size: 24px; }
  .card .none { font-size: 18px; line-height: 1.667; }
  .chart.wide { display: none; }
  .chart.narrow { display: block; }
  table, tbody, tr, td { display: block; width: 100%; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { border-bottom: 1px solid var(--line); padding: 8px 0; }
  tr:last-child { border-bottom: 0; padding-bottom: 0; }
  td, tr:last-child td { border: 0; padding: 2px 0; display: grid;
    grid-template-columns: 7.5em minmax(0, 1fr); gap: 10px; }
  td::before { content: attr(data-label); color: var(--muted); font-size: 13px;
    line-height: 1.65; }
  td.right { text-align: left; white-space: normal; }
  td > .state { justify-self: start; }
  td.wide { min-width: 0; }
  table td.lead { display: block; font-size: 15.5px; padding-bottom: 4px; }
  td.lead::before { content: none; }
  table td.empty { display: none; }
  table.dense tr { display: flex; flex-wrap: wrap; align-items: center; column-gap: 14px; }
  table.dense td { display: block; width: auto; }
  table.dense td.lead { width: 100%; }
  table.dense td.wide { flex: 1; }
  table.dense td::before { content: none; }
  dl { grid-template-columns: 1fr; gap: 1px; }
  dd { margin-bottom: 9px; }
}
"""
_PAPER = """
@page { margin: 14mm; }
@media print {
  h1 { font-size: 28px; }
  h2 { font-size: 16px; }
  body { font-size: 12px; background: none; -webkit-print-color-adjust: exact;
    print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  section { padding: 14px 16px; }
  section, .card, .note, tr { break-inside: avoid; }
  section.long { break-inside: auto; }
  h2, h3, thead { break-after: avoid; }
  td { padding-top: 4px; padding-bottom: 4px; }
  .small, .kind, td .quiet, .state, .note, dl, .card p.small { font-size: 11px; }
  .verdict { font-size: 13px; }
  .cards { grid-template-columns: repeat(3, 1fr); }
  .card .figure { font-size: 23px; }
  table { font-size: 11.5px; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

STYLE = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
    + _BASE
    + _PARTS
    + _NARROW
    + _PAPER
)
