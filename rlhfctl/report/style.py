"""The style sheet of the report: system fonts, light and dark by the reader's setting."""

from rlhfctl.report.chart import COLOURS

STYLE = """
:root{--bg:#fff;--fg:#1d2330;--quiet:#5d6675;--edge:#d9dee6;--card:#f6f8fa;--c0:#2563c9;--c1:#c2410c;
--c2:#15803d;--c3:#7e3fb5;--c4:#a16207;--c5:#be185d;--c6:#0e7490;--c7:#57534e;--good:#15803d;--bad:#b91c1c;--up:34,139,80;
--down:205,60,50}
@media (prefers-color-scheme:dark){:root{--bg:#12161d;--fg:#e4e8ee;--quiet:#98a2b3;--edge:#2c3440;
--card:#1a2029;--c0:#6ea8fe;--c1:#fb923c;--c2:#4ade80;--c3:#c084fc;--c4:#facc15;--c5:#f472b6;--c6:#22d3ee;--c7:#d6d3d1;
--good:#4ade80;--bad:#f87171;--up:52,168,104;--down:226,92,84}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:22px;margin:8px 0}
h2{font-size:17px;margin:28px 0 8px;border-bottom:1px solid var(--edge)}
.quiet,figcaption{color:var(--quiet)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:8px;background:var(--card);border:1px solid var(--edge);border-radius:8px}
figcaption{font-size:13px}
svg{width:100%;height:auto;display:block}
svg text{font:10px system-ui,sans-serif;fill:var(--quiet)}
.grid{stroke:var(--edge)}
polyline{fill:none;stroke-width:1.6}
polygon{opacity:.16}
figure p{margin:4px 0 0;font-size:12px}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px}
.tree{font-size:13px;margin:0;padding-left:18px}
.tree pre{display:inline-block;margin:2px 0;padding:2px 6px}
.tree .out{opacity:.55}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}
td,th{border-bottom:1px solid var(--edge);padding:4px 10px 4px 0;text-align:left;vertical-align:top}
pre{background:var(--card);border:1px solid var(--edge);border-radius:6px;padding:8px;
white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0}
.prompt{color:var(--quiet)}
.above{background:rgba(var(--up),var(--a))}
.below{background:rgba(var(--down),var(--a))}
.observed{opacity:.5}
.error,.failed{color:var(--bad)}
.done,.ok{color:var(--good)}
summary{cursor:pointer;margin:6px 0}
code{overflow-wrap:anywhere}
.name{display:inline-block;margin-right:8px}
.key{display:inline-block;width:14px;height:3px;vertical-align:middle;margin-right:5px}
"""
# A rule for each line colour, and for its key in the overview.
LINES = "".join(
    f".line{i}{{stroke:var(--c{i})}}.dot{i},.key{i},.band{i}{{fill:var(--c{i});background:var(--c{i})}}"
    for i in range(COLOURS)
)
