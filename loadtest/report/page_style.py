"""The style sheet of a report's page: light and dark, wide and narrow."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1c2530; --faint: #5d6b7a; --line: #dde2e8;
  --good: #1a7f37; --bad: #b3261e; --bad-paper: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --paper: #12171d; --card: #1b222b; --ink: #e3e9ef; --faint: #9aa8b6;
  --line: #303a45; --good: #57c272; --bad: #ff8a80; --bad-paper: #3a1d1b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p, li, figcaption { overflow-wrap: anywhere; }
.lead, article p, figcaption, dt, dd small { color: var(--faint); }
.lead { margin: 0 0 1.25rem; }
.banner { border: 1px solid var(--bad); border-left-width: .4rem; background: var(--bad-paper); border-radius: .4rem;
  padding: .75rem 1rem; margin: 0 0 1rem; }
.banner ul { margin: .25rem 0 0; padding-left: 1.25rem; }
.cards, .grid { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
article, figure, .wide, details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
article { padding: 1rem; }
article p { margin: 0 0 .75rem; font-size: .85rem; }
.valid, .invalid { font-size: .75rem; font-weight: 600; border: 1px solid; border-radius: 1rem; padding: .1rem .5rem; }
.valid { color: var(--good); }
.invalid { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 0; }
dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .75rem; font-weight: 400; }
figure { margin: 0; padding: .75rem; }
figcaption { font-size: .8rem; margin-top: .25rem; }
.plot { background: #fff; border-radius: .4rem; }
.plot svg { display: block; width: 100%; max-width: 44rem; height: auto; margin: 0 auto; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.text { text-align: left; }
td.text { white-space: normal; }
td.text:last-child { overflow-wrap: anywhere; min-width: 12rem; }
details { padding: .6rem 1rem; }
summary { cursor: pointer; }
details .wide { border: 0; margin: .5rem 0 0; }
pre { overflow-x: auto; font-size: .8rem; }
code { overflow-wrap: anywhere; }
"""
