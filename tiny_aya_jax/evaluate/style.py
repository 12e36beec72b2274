"""The page's skeleton and its CSS: light, dark, on paper and on a phone; nothing is fetched."""

import html

SKELETON = """<!doctype html>
<html lang="en" dir="ltr"><head><meta charset="utf-8"><title><!--title--></title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>
/*style*/
</style></head><body><main>
<!--body-->
</main></body></html>
"""


def document(title, css, body):
  """HTML, whole; `title` is text, `body` an iterable of HTML."""
  head = SKELETON.replace("/*style*/", css).replace("<!--title-->", html.escape(title))
  return head.replace("<!--body-->", "\n".join(body))


def sheet(result, views):
  """The CSS, with a shade for each checkpoint and the widths below which table rows are stacked."""
  many = max(len(result["checkpoints"]), 1)
  bar = 8 if many < 3 else 5 if many < 6 else 3
  shades = [f"color-mix(in srgb,var(--strong) {100 * (index + 1) / many:.0f}%,var(--pale))"
            for index in range(many)]
  bars = ",".join(f"linear-gradient({shade} 0 0) 0 {4 + index * (bar + 1)}px/"
                  f"calc(var(--{index})*1%) {bar}px no-repeat"
                  for index, shade in enumerate(shades))
  rules = [f".s{index}{{background:{shade}}}" for index, shade in enumerate(shades)]
  rules.append(f".all td[style]{{background:{bars};height:{7 + many * (bar + 1)}px}}")
  rules.append(f".groups{{--least:{7.5 + 4.3 * many}em}}")
  for count, beside in sorted({(len(view["names"]), len(view["beside"])) for view in views}):
    rules.append(_stack(f".k{count + beside}.beside{beside}.all", count + beside,
                        500 + 78 * (count + beside)))
    if beside:
      rules.append(f".all.beside{beside} td:nth-last-child(-n+{beside}){{color:var(--muted)}}")
  rules.append(_stack(f".k{many}.small", many, 40 + round(15 * (7.5 + 4.3 * many))))
  widest = max((len(view["names"]) for view in views), default=1)
  rules.append(_OVERVIEW % dict(count=widest, width=200 + 180 * widest))
  return CSS + "\n".join(rules)


def _stack(table, count, width):
  """Below a width a row's figures go under its name, in lines of equal length."""
  lines = -(-count // 5)
  return _STACK % dict(table=table, width=width, count=count, few=-(-count // lines))


_STACK = """@media (max-width:%(width)dpx){
%(table)s,%(table)s :is(thead,tbody){display:block}
%(table)s tr{display:grid;position:relative;padding:4px 0;border-bottom:1px solid var(--line);
 grid-template-columns:repeat(auto-fill,minmax(max(4.5em,calc(100%% / %(count)d - 1px)),1fr))}
%(table)s :is(th:first-child,td[style],.axis){grid-column:1/-1;width:auto}
%(table)s tr>:is(th,td){border-block:0;padding:1px 6px 1px 0;width:auto;text-align:start}
%(table)s tr>td[style]{border-inline-start:0;margin-bottom:2px}
%(table)s tr>.axis{border-inline-start:0;height:auto}
%(table)s .region .axis{display:none}
%(table)s.all tr>:nth-child(2){position:absolute;inset-inline-end:0;top:4px}
%(table)s .region{padding-top:1em}
%(table)s thead{position:sticky;top:0;z-index:1}
%(table)s thead tr>*{position:static}
%(table)s thead tr{background:var(--back)}
%(table)s.all thead th:nth-child(2){position:absolute}
%(table)s thead :is(i,u){display:inline-block;margin:0 .35em 0 0}
}
@media (max-width:480px){%(table)s tr{grid-template-columns:repeat(%(few)d,1fr)}}"""

_OVERVIEW = """@media (max-width:%(width)dpx){
.o%(count)d,.o%(count)d tbody{display:block}.o%(count)d thead{display:none}
.o%(count)d tr{display:grid;gap:4px 18px;padding:10px 0;border-bottom:1px solid var(--line);
 grid-template-columns:repeat(auto-fill,minmax(min(100%%,9.5em),1fr))}
.o%(count)d :is(th,td){border:0;padding:0}.o%(count)d th{grid-column:1/-1}
.o%(count)d .none{display:none}
.o%(count)d td::before{content:attr(data-name);display:block;color:var(--muted);font-size:.85em}
}"""

# Blue and orange stay apart for every kind of colour blindness; the regions' are Okabe and Ito's,
# darkened to 3:1 on white. Nothing is told by colour alone.
CSS = """:root{--back:#fcfcfa;--ink:#1b1e22;--muted:#565d66;--line:#dcdfe3;--pale:#7199c4;
--strong:#124684;--better:#1a63ad;--worse:#a84300;--r0:#0072b2;--r1:#b0528a;--r2:#c04a00;
--r3:#00805c;--r4:#8a6a00;--r5:#5a5a5a;--u0:#7b3fa0;--u1:#00805c;--u2:#a86a00}
@media screen and (prefers-color-scheme:dark){:root{--back:#14171b;--ink:#e7e9ec;--muted:#a2abb6;
--line:#30363e;--pale:#4c70a0;--strong:#9ccbff;--better:#7db8f5;--worse:#f59a5b;--r0:#56b4e9;
--r1:#e39cc4;--r2:#f0803c;--r3:#2fbf94;--r4:#e0b000;--r5:#aaa;--u0:#c795e8;--u1:#2fbf94;
--u2:#e6a53a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;background:var(--back);color:var(--ink)}
body{margin:0;font:15px/1.45 system-ui,sans-serif;font-variant-numeric:tabular-nums lining-nums}
main{max-width:1440px;margin:auto;padding:20px clamp(14px,3vw,40px) 60px;overflow-wrap:anywhere}
h1{font-size:1.75em;line-height:1.2;margin:.4em 0 .6em}
h2{font-size:1.3em;line-height:1.25;margin:2em 0 .5em}
h3{font-size:1.02em;margin:1.8em 0 .2em}
p{max-width:60em;margin:.5em 0}
small,th i,p>i,.key,code{font-size:.86em;font-weight:400;font-style:normal}
small,th i,p>i,.key,.none{color:var(--muted)}
a{color:inherit;text-decoration-color:var(--strong);text-underline-offset:3px}
:is(a,summary):focus-visible{outline:2px solid var(--strong);outline-offset:3px;border-radius:2px}
th,td,li{unicode-bidi:isolate}
table{border-collapse:separate;border-spacing:0;width:100%}
th,td{padding:3px 10px 3px 0;text-align:start;vertical-align:top;font-weight:400}
thead :is(th,td){position:sticky;top:0;background:var(--back);z-index:1;color:var(--muted);
 font-size:.86em;vertical-align:bottom;border-bottom:1px solid var(--line)}
.checkpoints{list-style:none;padding:0;display:grid;gap:8px 28px;
 grid-template-columns:repeat(auto-fit,minmax(min(100%,20em),1fr))}
.checkpoints code,.checkpoints em{color:var(--muted)}
:is(.checkpoints,thead) i{display:inline-block;width:.75em;height:.75em;margin-inline-end:.4em;
 border-radius:2px}
.overview{table-layout:fixed}
.overview :is(td,th){border-top:1px solid var(--line);padding:8px 18px 8px 0}
.overview small{display:block}
.overview td>b{font-size:1.15em}
.rug{background:linear-gradient(var(--line) 0 0) 0 50%/100% 1px no-repeat;display:block;
 width:100%;max-width:260px;height:16px;margin:2px 0}
.rug path{fill:none;stroke:var(--strong);stroke-opacity:.5;vector-effect:non-scaling-stroke}
.rug .mean{stroke:var(--ink);stroke-opacity:1;stroke-width:2}
details{border-top:1px solid var(--line);margin-top:1em}
details+details{margin-top:0}
summary{cursor:pointer;padding:12px 0;display:flex;flex-wrap:wrap;gap:0 16px;align-items:baseline}
summary::before{content:"";width:.5em;height:.5em;flex:none;transform:rotate(-45deg);
 border:solid var(--strong);border-width:0 2px 2px 0}
details[open]>summary::before{transform:rotate(45deg)}
summary::-webkit-details-marker{display:none}
summary h2{margin:0}
summary span{color:var(--muted);margin-inline-start:auto}
.better{color:var(--better)}.worse{color:var(--worse)}
.change{list-style:none;padding:0;margin:.6em 0;columns:17em;column-gap:28px}
.change li{display:grid;grid-template-columns:5.4em 1fr 4.4em;gap:8px;align-items:center;
 text-align:end;font-size:.86em;line-height:1.55;break-inside:avoid}
.change li{color:var(--better)}.change .worse{color:var(--worse)}
.change .same,.cost li{color:inherit}
.change i{position:relative;height:12px;margin:0 5px;background:
 linear-gradient(currentColor 0 0) calc(var(--a)*1%) 50%/2px 10px no-repeat,
 linear-gradient(var(--line) 0 0) 0 50%/100% 1px no-repeat}
.change i::before{content:"";position:absolute;top:5px;height:2px;background:currentColor;
 left:calc(min(var(--a),var(--b))*1%);
 width:calc((max(var(--a),var(--b)) - min(var(--a),var(--b)))*1%)}
.change i::after,.dot{width:8px;height:8px;border-radius:50%;background:currentColor}
.change i::after{content:"";position:absolute;top:2px;left:calc(var(--b)*1% - 4px)}
.change .worse i::after,.dot.diamond{border-radius:0;transform:rotate(45deg)}
.dot{display:inline-block;color:var(--better);margin-inline:.25em .2em}
.dot.diamond{color:var(--worse)}
.cost i{background:none;color:var(--strong);margin:0}
.cost i::before{left:0;top:2px;height:8px;width:calc(var(--b)*1%)}
.cost i::after{content:none}
u{text-decoration:none}
u.tick{display:inline-block;width:2px;height:10px;background:currentColor;margin:0 2px}
u.chance{display:inline-block;height:1em;border-inline-start:2px dashed var(--ink);
 vertical-align:-2px;margin-inline-end:.2em}
.groups{display:grid;gap:18px 28px;grid-template-columns:
 repeat(auto-fit,minmax(min(100%,var(--least)),1fr))}
.groups :is(td,th){border-bottom:1px solid var(--line);font-size:.92em}
.groups table{align-self:start}
:is(.small,.all) :is(th:not(:first-child),td:not([style],.axis)){text-align:end;
 padding-inline-end:4px}
:is(.small,.all) thead :is(i,u){display:block;margin:0 0 2px auto}
.small :is(td,th:not(:first-child)){width:4.6em}
.groups thead th{font-size:.8em}.groups thead th:not(:first-child){width:5.3em}
.all th:first-child{width:17em}
.all tr>:nth-child(2){width:6em;font-size:.86em;color:var(--muted)}
.all :is(td:not([style],:nth-child(2),.axis),thead th:nth-child(n+4)){width:5.2em}
.all tbody tr:hover>:not([style]){background:color-mix(in srgb,var(--line) 45%,transparent)}
.all td b{color:var(--worse);display:inline-block;width:.5em;margin-inline-end:-.5em}
.region :is(th,td){padding-top:1.1em;font-weight:600;border-bottom:1px solid var(--line)}
.all td[style],.axis{padding:0;position:relative;border-inline:14px solid transparent}
.axis span:last-child{float:inline-end}
.region .axis{border-inline:0}
.untrained{background:repeating-linear-gradient(135deg,var(--muted) 0 1px,transparent 1px 4px)}
[style*=chance] td[style]::after{content:"";position:absolute;inset-block:1px;left:var(--chance);
 border-inline-start:2px dashed var(--ink)}
td u{position:absolute;inset-block:2px;left:calc(var(--x) - 1px);width:2px}
thead u{width:2px;height:.9em}
:is(td,thead) u{background:var(--muted)}
:is(td,thead) .u0{background:var(--u0)}:is(td,thead) .u1{background:var(--u1)}
:is(td,thead) .u2{background:var(--u2)}
.plots{display:grid;gap:24px 36px;
 grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr))}
figure{margin:0;container-type:inline-size;min-width:0}
.right,.left{transform:translate(6px,4px)}.left{transform:translate(-6px,4px);text-anchor:end}
.over,.under{transform:translate(0,-7px);text-anchor:middle}.under{transform:translate(0,15px)}
figcaption{margin-bottom:4px}figcaption small{display:block}
.plot{display:block;height:300px;margin:6px 6px 26px 40px;width:calc(100% - 46px);overflow:visible}
.plot circle{r:4px}
.plot text{font-size:11px;fill:var(--ink)}
.grid line{stroke:var(--line)}.plot .grid text{fill:var(--muted)}
.plot .fit{stroke:var(--muted);stroke-dasharray:5 4}
.plot .broad{display:none}
@container (min-width:606px){.plot .broad{display:block}}
dl{display:grid;grid-template-columns:minmax(0,14em) minmax(0,1fr);gap:6px 20px}
dt{color:var(--muted)}dd{margin:0}
@media (max-width:600px){dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:8px}
.change{columns:1}summary span{margin-inline-start:1.1em;flex-basis:100%}h1{font-size:1.45em}}
@media print{:root{--back:#fff}body{font-size:10pt}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;display:block;block-size:auto}
thead :is(th,td){position:static}tr,li,figure{break-inside:avoid}h2,h3{break-after:avoid}}
@media (forced-colors:active){.dot,.rug,td u,.change i::after{forced-color-adjust:none}}
"""
CSS += "".join(f".r{index}{{fill:var(--r{index})}}.key .r{index} .dot{{color:var(--r{index})}}"
               for index in range(6))
