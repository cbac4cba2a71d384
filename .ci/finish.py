"Quarto runs this after the site is built: pages load nothing from other hosts, and pictures have alternative texts."
import html, os, re
from pathlib import Path

# Quarto adds these for widgets to every page with an HTML output; ours have none
others = re.compile(r'<script src="https://cdnjs[^>]*></script>|<script type="application/javascript">define\(.jquery.*?</script>\n?', re.S)
figure = re.compile(r'(<figure\b(?:(?!</figure>).)*?<img\b)((?:(?!</figure>).)*?<figcaption[^>]*>)(.*?)(</figcaption>)', re.S)

def plain(text): return html.escape(html.unescape(re.sub(r'<[^>]+>', '', text)).strip(), quote=True)

def with_text(m):
    "A figure whose picture is described by its caption, unless it is described already"
    start,rest,caption,end = m.groups()
    if re.search(r'\balt="[^"]+"', rest): return m[0]
    rest = re.sub(r'\s*alt=""', '', rest)
    return f'{start} alt="{plain(caption)}"{rest}{caption}{end}'

def finish(text): return figure.sub(with_text, others.sub('', text))

if __name__ == '__main__':
    for page in Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR']).rglob('*.html'):
        text = page.read_text(encoding='utf-8')
        if (new := finish(text)) != text: page.write_text(new, encoding='utf-8')
