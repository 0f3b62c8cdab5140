"""How a report looks: the template of its page with its style, and that of its Markdown."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5f6670; --paper: #fff; --line: #dfe3e8; --band: #f4f6f8;
  --link: #0b57b0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6ea; --faint: #9aa3ae; --paper: #14171a; --line: #31373e; --band: #1d2125; --link: #8ab8ff }
  img.plot { filter: invert(0.92) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
header h2 { margin-top: 1.4rem }
p { max-width: 44rem; margin: .6rem 0 }
a { color: var(--link) }
nav ol { max-width: 44rem; padding-left: 1.4rem }
nav li { margin: .4rem 0 }
nav li span { display: block }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; max-width: 62rem }
dt { color: var(--faint) }
dd { margin: 0 }
details p { max-width: none }
.lead, figcaption { color: var(--faint) }
.table, .picture { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: normal }
thead th, thead td { border-bottom: 2px solid var(--line); vertical-align: bottom }
tbody th { font-weight: normal; min-width: 10rem }
tr { background: var(--paper) }
tbody tr:nth-child(even) { background: var(--band) }
/* The names of the rows stay in sight while the rest of a wide table scrolls below them. */
tr > :first-child { position: sticky; left: 0; background: inherit }
.text td { min-width: 7rem }
.text td:last-child:not(:nth-child(2)) { min-width: 14rem }
.numeric td, .numeric th:not(:first-child) { text-align: right; white-space: nowrap }
.numeric tbody th { white-space: nowrap }
figure { margin: 1rem 0 }
figcaption { font-size: .9rem; max-width: 44rem; margin: .4rem 0 }
/* What is wider than a phone shrinks to 36rem at most, so that its text stays legible, and scrolls. */
img { display: block; height: auto; max-width: max(100%, 36rem) }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr }
  dd { margin-bottom: .4rem }
  th, td { padding: .3rem .5rem }
  .numeric tbody th { white-space: normal; min-width: 7.5rem }
}
@page { margin: 15mm }
@media print {
  :root { color-scheme: light; --text: #000; --faint: #444; --paper: #fff; --line: #bbb; --band: #fff; --link: #000 }
  body { max-width: none; padding: 0; font-size: 10pt }
  img.plot { filter: none }
  figure:has(img), tr { break-inside: avoid }
  h2, figcaption { break-after: avoid }
  img { max-width: 100% }
  .table, .picture { overflow: visible }
  table { font-size: 7.5pt }
  th, td { padding: .15rem .3rem }
  th:first-child, td { min-width: 0 !important; white-space: normal !important }
  tr > :first-child { position: static }
}
"""

# default-src 'none' keeps a browser from loading whatever a text might smuggle in.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ report.title }}</h1>
<p class="lead">{{ report.lead }}</p>
<nav aria-label="Contents">
<h2>Asked and found</h2>
<ol>
{% for section in report.sections %}
<li><a href="#section-{{ loop.index }}">{{ section.title }}</a>\
{% if section.finding() %}<span>{{ section.finding() }}</span>{% endif %}</li>
{% endfor %}
</ol>
</nav>
<dl>
{% for name, text in facts %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}
{% if files %}
<dt>Figures</dt><dd>{% for file in files %}<a href="{{ file|urlencode }}">{{ file }}</a>{{ ", " if not loop.last }}\
{% endfor %}</dd>
{% endif %}
{% if runs %}
<dt>Runs</dt><dd><details><summary>{{ runs.values()|map("length")|sum }} beside this page</summary>
{% for study, pages in runs.items() %}
<p>{{ study }}: {% for name, page in pages.items() %}<a href="{{ page|urlencode }}">{{ name }}</a>\
{{ ", " if not loop.last }}{% endfor %}</p>
{% endfor %}
</details></dd>
{% endif %}
</dl>
</header>
{% for section in report.sections %}
<section aria-labelledby="section-{{ loop.index }}">
<h2 id="section-{{ loop.index }}">{{ section.title }}</h2>
{% for text in section.texts %}
<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}
{% set best = table.best() %}
<figure><figcaption>{{ table.title }}{% if best %}. Bold: the best mean of its column.{% endif %}</figcaption>
<div class="table" tabindex="0" role="group" aria-label="{{ table.title }}">\
<table class="{{ "numeric" if table.numeric else "text" }}">
<thead><tr>{% for column in table.columns %}\
{% if column %}<th scope="col">{{ column }}</th>{% else %}<td></td>{% endif %}\
{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
{% set number = loop.index0 %}
<tr>{% for cell in row %}\
{% if loop.first %}<th scope="row">{{ cell }}</th>\
{% elif (number, loop.index0) in best %}<td><b>{{ cell }}</b></td>{% else %}<td>{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div></figure>
{% endfor %}
{% for picture in section.pictures %}
<figure><div class="picture" tabindex="0" role="group" aria-label="{{ picture.caption }}">\
<img class="{{ "photographs" if picture.photographs else "plot" }}" \
{{ picture.source()|safe }} alt="{{ picture.seen() }}"></div>
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""

MARKDOWN = """\
# {{ report.title }}

{{ report.lead }}
{% for section in report.sections %}

## {{ section.title }}
{% for text in section.texts %}

{{ text }}
{% endfor %}
{% for table in section.tables %}

**{{ table.title }}**

{{ row(table.columns) }}
|---|{{ ("---:|" if table.numeric else "---|") * (table.columns|length - 1) }}
{% for cells in table.rows %}
{{ row(cells) }}
{% endfor %}
{% endfor %}
{% for picture in section.pictures %}

![{{ picture.caption }}]({{ picture.path.relative_to(folder).as_posix() }})
{% endfor %}
{% endfor %}
"""
