"Quarto runs this after the site is built: pages load nothing from other hosts, pictures have alternative texts, and links lead somewhere."
import html, os, re
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).parents[1]

# Quarto adds these for widgets to every page with an HTML output; ours have none
others = re.compile(r'<script src="https://cdnjs[^>]*></script>|<script type="application/javascript">define\(.jquery.*?</script>\n?', re.S)
figure = re.compile(r'(<figure\b(?:(?!</figure>).)*?<img\b)((?:(?!</figure>).)*?<figcaption[^>]*>)(.*?)(</figcaption>)', re.S)

def home():
    "The address at which the site is published, and to which nbdev's links lead"
    settings = ConfigParser()
    settings.read(root/'settings.ini', encoding='utf-8')
    return settings['DEFAULT']['doc_host'] + settings['DEFAULT']['doc_baseurl']

def plain(text): return html.escape(html.unescape(re.sub(r'<[^>]+>', '', text)).strip(), quote=True)

def with_text(m):
    "A figure whose picture is described by its caption, unless it is described already"
    start,rest,caption,end = m.groups()
    if re.search(r'\balt="[^"]+"', rest): return m[0]
    rest = re.sub(r'\s*alt=""', '', rest)
    return f'{start} alt="{plain(caption)}"{rest}{caption}{end}'

def finish(text): return figure.sub(with_text, others.sub('', text))

def unlinked(text, places):
    "Names that no page documents, such as `exporti` ones, without nbdev's link; `places`: page -> ids of its elements"
    def one(m): return m[0] if m[1] not in places or m[2] in places[m[1]] else m[3]
    return re.sub(rf'<a href="{home()}/([^"#]+)#([^"]+)"[^>]*>(<code>[^<]*</code>)</a>', one, text)

if __name__ == '__main__':
    folder = Path(os.environ['QUARTO_PROJECT_OUTPUT_DIR'])
    pages = {p.relative_to(folder).as_posix():finish(p.read_text(encoding='utf-8')) for p in folder.rglob('*.html')}
    places = {name:set(re.findall(r'\bid="([^"]+)"', text)) for name,text in pages.items()}
    for name,text in pages.items(): (folder/name).write_text(unlinked(text, places), encoding='utf-8')
