"""What the page of a sweep adds to the CSS of an evaluation's page (evaluate/style.py)."""

from tiny_aya_jax.evaluate import style


def css(arms):
  """The CSS for tables with so many arms side by side."""
  return style.CSS + _CSS + _STACK % dict(arms=max(arms, 1), wide=400 + 79 * arms)


# Of the heat, at most 45% is colour, so that the ink on it stays above 7:1.
_CSS = """.say{font-size:1.15em;max-width:52em}
.facts{color:var(--muted)}
.warning{border-inline-start:4px solid var(--worse);padding:2px 0 2px 12px;max-width:58em}
.warning b{color:var(--worse)}
.arms td,.arms th{border-top:1px solid var(--line);padding:6px 14px 6px 0}
.arms :is(td,thead th){overflow-wrap:normal}
.arms small{display:block}
.arms .chosen>th{font-weight:600}
.heat{font-size:.9em;width:auto}
.heat :is(td,th:not(:first-child)){text-align:end;width:79px;padding:2px 4px}
.heat th:first-child{width:19em}
.heat th small{color:var(--muted)}
.heat thead :is(th,td){line-height:1.2;font-size:.8em}
.heat td:nth-child(2){color:var(--muted)}
.heat td:not(.spread) small{display:block;line-height:1.1}
.heat td{white-space:nowrap}
.heat .spread{width:7em}
.heat tbody tr:hover>th{background:color-mix(in srgb,var(--line) 45%,transparent)}
.heat td[style]{background:color-mix(in srgb,var(--worse) calc(var(--h)*.45%),transparent)}
.heat .best{font-weight:700;text-decoration:underline;text-underline-offset:3px}
.heat .much{color:var(--worse)}
.heat .chosen{border-inline:1px solid var(--muted)}
.heat .region :is(th,td){padding-top:1em}
.change b{color:var(--ink);font-weight:600}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.plot circle.ring{r:6px}.plot .ring+circle{r:3px}
.plot .front{fill:var(--strong)}
.plot .beaten{fill:var(--back);stroke:var(--strong);stroke-width:1.5}
.plot circle.seed{r:2px;fill:var(--muted)}
.plot .right{transform:translate(9px,4px)}.plot .left{transform:translate(-9px,4px)}
.law{width:auto}
.law:is(*,.small) :is(th,td){width:auto;overflow-wrap:normal;padding-inline-end:min(18px,2vw)}
summary{flex-wrap:nowrap}
.groups{--least:26em}
table+.plots{margin-top:16px}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.share:is(*,.small) :is(td,th:not(:first-child)){width:6.2em}
pre{white-space:pre-wrap;font-size:.8em}
.across{text-align:center;margin:-8px 0 8px 40px}
.curve line{stroke-width:2}
.plot .curve circle{r:3px}
.curves{width:calc(100% - 146px);margin-right:106px}
.every{fill:var(--ink)}.every line{stroke:var(--ink);stroke-width:3}
.plot .names .every{font-weight:700}
"""
_CSS += "".join(f".r{index} line{{stroke:var(--r{index})}}"
                f".plot .names .r{index}{{fill:var(--r{index})}}" for index in range(6))

# On a narrow screen an arm's figures stand below its name, a language's below its own.
_STACK = """
@media (max-width:1000px){
.arms,.arms tbody{display:block}.arms thead{display:none}
.arms tr{display:grid;gap:4px 18px;padding:10px 0;border-bottom:1px solid var(--line);
 grid-template-columns:repeat(auto-fill,minmax(min(100%%,10em),1fr))}
.arms :is(th,td){border:0;padding:0}.arms th{grid-column:1/-1}
.arms td::before{content:attr(data-name);display:block;color:var(--muted);font-size:.85em}
}
@media (max-width:%(wide)dpx){
.heat,.heat :is(thead,tbody){display:block}
.heat tr{display:grid;position:relative;padding:3px 0;border-bottom:1px solid var(--line);
 grid-template-columns:repeat(auto-fill,minmax(max(6em,calc(100%% / %(arms)d - 1px)),1fr))}
.heat tr>:is(th,td):is(*,:first-child){width:auto;min-width:0;border-block:0;padding:1px 4px}
.heat tr>:first-child{grid-column:1/-1;padding:1px 11em 1px 0}
.heat tr>:nth-child(2){position:absolute;inset-inline-end:5.5em;top:3px}
.heat tr>.spread{position:absolute;inset-inline-end:0;top:3px}
.heat .spread small{display:inline}
.heat .region{padding-top:1em}.heat tr.region>*{padding-top:1px}
.heat .region>:is(:nth-child(2),.spread){top:1em}
.heat thead{position:sticky;top:0;z-index:1}
.heat thead tr{background:var(--back)}
.heat thead tr>*{position:static}
}
@media (max-width:480px){.law{font-size:.84em}}
@media print{.heat thead{position:static}}
"""
