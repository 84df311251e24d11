"""The style sheet of reports and of the web page: light, few colours, room around everything."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { --ink: #1f2a37; --soft: #5b6776; --faint: #68737f; --line: #e3e8ee; --paper: #ffffff;
  --ground: #f6f8fa; --query: #3f6ad8; --document: #0f8a7e; --both: #d97706; --accent: #1d4ed8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.3; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 12px; }
h3 { font-size: 14px; font-weight: 600; color: var(--soft); margin: 28px 0 10px; }
p { margin: 0 0 12px; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.note { color: var(--soft); font-size: 14px; max-width: 72ch; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 24px 28px; margin: 24px 0; }
.text { unicode-bidi: isolate; overflow-wrap: anywhere; max-width: 78ch; }
.sides { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 40px; }
.columns { display: grid; grid-template-columns: minmax(0, 1.2fr) minmax(0, 1fr); gap: 8px 48px;
  align-items: start; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { font-weight: 500; font-size: 13px; color: var(--soft); text-align: left; }
th, td { padding: 6px 18px 6px 0; vertical-align: middle; }
th:last-child, td:last-child { padding-right: 0; }
tr + tr > td { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.word { overflow-wrap: anywhere; font-weight: 500; } td.whole { white-space: nowrap; }
tr.piece > td { border-top: 0; color: var(--soft); font-size: 14px; padding-top: 0; }
tr.piece > td.word { padding-left: 20px; font-weight: 400; }
tr.total > td { border-top: 2px solid var(--ink); font-weight: 600; }
td.bars { width: 40%; min-width: 48px; }
svg { display: block; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
svg.bar { width: 100%; height: 10px; border-radius: 3px; }
.fill-query { fill: var(--query); } .fill-document { fill: var(--document); }
.fill-both { fill: var(--both); }
svg.cloud { max-width: 100%; height: auto; margin: 4px auto 12px; }
.cloud .w1 { fill: #12403b; font-weight: 700; } .cloud .w2 { fill: #0b7a6f; font-weight: 600; }
.cloud .w3 { fill: #4c7f79; font-weight: 500; }
.query-side .cloud .w1 { fill: #1c2f6b; } .query-side .cloud .w2 { fill: #3f6ad8; }
.query-side .cloud .w3 { fill: #5a73b8; }
.grid .axis { font-size: 13px; fill: var(--ink); }
.grid .value { font-size: 11px; fill: var(--ink); }
.grid .on-dark { fill: #ffffff; }
.grid .cell { fill: var(--document); } .query-side .grid .cell { fill: var(--query); }
.fired { display: flex; flex-wrap: wrap; gap: 10px 8px; align-items: stretch; }
.fired > div { border: 1px solid var(--line); border-radius: 8px; padding: 6px 12px 8px;
  min-width: 64px; max-width: 220px; background: var(--paper); }
.fired .name { font-weight: 600; overflow-wrap: anywhere; }
.fired .special { color: var(--faint); font-weight: 500; }
.fired .none { background: transparent; border-style: dashed; }
.fired .none .name { font-weight: 400; color: var(--soft); }
.fired dl { margin: 2px 0 0; display: grid; grid-template-columns: minmax(0, 1fr) auto;
  gap: 0 14px; font-size: 13px; line-height: 1.5; color: var(--soft); }
.fired dt { overflow-wrap: anywhere; }
.fired dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
mark { color: inherit; border-radius: 3px; padding: 0 2px; margin: 0 -2px; }
mark.m1 { background: #fdf3d8; } mark.m2 { background: #fbe3a6; }
mark.m3 { background: #f9cf70; } mark.m4 { background: #f5b83d; }
.patches { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; }
.patches > .scroll { flex: 0 1 auto; }
.patches svg { max-width: 100%; height: auto; border-radius: 6px; }
.patch { fill: #0b3b36; }
.patch-word { fill: #ffffff; font-weight: 600; stroke: #0b3b36; stroke-width: 3px;
  stroke-linejoin: round; paint-order: stroke; }
.share { fill: #d3006c; }
figure > svg, img.plain { max-width: 100%; height: auto; border-radius: 6px; display: block; }
img.plain { min-width: 96px; background: var(--ground); border: 1px solid var(--line); }
.small-maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr));
  gap: 16px; flex: 1 1 300px; }
figure { margin: 0; } figure + figure { margin-top: 20px; }
.small-maps figure { margin: 0; }
figcaption { font-size: 14px; color: var(--soft); padding-top: 4px; }
footer { color: var(--faint); font-size: 13px; padding-top: 8px; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 20px 14px 40px; } h1 { font-size: 22px; }
  .card { padding: 18px 16px; margin: 16px 0; border-radius: 8px; }
  .columns { grid-template-columns: minmax(0, 1fr); }
  th, td { padding-right: 10px; }
  .reasons td.bars, .reasons th.bars { display: none; }
  /* Words of patches would be too small to read; the map is pushed sideways in its frame. */
  .patches > .scroll > svg { max-width: none; width: 500px; }
}
@media print { body { background: #ffffff; } .card { break-inside: avoid; } }
""".strip()
