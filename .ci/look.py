"""Look at every page of the built site as a reader does, and fail on what a reader would stumble over.

    python .ci/look.py [--pages index cli] [--pictures FOLDER]     # after `nbdev_docs`; needs Chromium and `pip install playwright`

Each page is opened on a wide screen and on a phone, in both colour schemes. It fails on code and output that is cut off, pages wider than the screen, broken
links, errors in the console, files from other hosts, images without alternative text, and text that cannot be told from its background.
"""
import argparse, shutil, sys, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlparse
from playwright.sync_api import sync_playwright
from finish import home, root

widths,schemes = {'wide':1280, 'phone':390},('light','dark')

# what is looked at in the page itself; each returns a list of texts
looks = dict(
    cut="""() => [...document.querySelectorAll('main pre')].filter(e => e.scrollWidth > e.clientWidth + 2)
           .map(e => 'cut off: ' + e.innerText.split('\\n').sort((a,b) => b.length-a.length)[0].slice(0, 100))""",
    wide="""() => { const w = document.documentElement.scrollWidth; return w > innerWidth ? [`page is ${w} pixels wide`] : [] }""",
    alt="""() => [...document.querySelectorAll('main img')].filter(e => !e.alt.trim()).map(e => 'no alternative text: ' + e.src.slice(-60))""",
    faint="""() => {
        const rgb = c => (c.match(/[\\d.]+/g) || [0,0,0,0]).map(Number)
        const lum = ([r,g,b]) => [r,g,b].map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4).reduce((s,v,i) => s + v*[.2126,.7152,.0722][i], 0)
        const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return c } return [255,255,255] }
        const texts = [...document.querySelectorAll('main h1, main h2, main h3, main h4, main p, main li, main td, main th, main figcaption, main pre code span, main pre, nav a')]
        const bad = texts.filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())).filter(e => {
            const [a,b] = [lum(rgb(getComputedStyle(e).color)), lum(behind(e))].sort((x,y) => y-x)
            return (a+.05)/(b+.05) < 2.5 })
        return [...new Set(bad.map(e => `faint ${e.tagName.toLowerCase()}: ` + e.innerText.slice(0, 40)))].slice(0, 5) }""")

def pages_of(site): return sorted(p.relative_to(site).with_suffix('').as_posix() for p in site.rglob('*.html') if 'site_libs' not in p.parts)

def serve(site):
    "The address of a server for the folder"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1',0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}/'

def open_page(browser, base, name, width, scheme):
    "The page, and what went wrong while it was loaded"
    page,wrong = browser.new_page(viewport=dict(width=width, height=900)),[]
    page.on('console', lambda m: m.type == 'error' and wrong.append(f'console: {m.text[:120]}'))
    page.on('pageerror', lambda e: wrong.append(f'error: {str(e)[:120]}'))
    page.on('response', lambda r: r.status >= 400 and wrong.append(f'{r.status}: {r.url}'))
    page.on('request', lambda r: urlparse(r.url).scheme in ('http','https') and not r.url.startswith(base) and wrong.append(f'from another host: {r.url[:80]}'))
    page.add_init_script(f"localStorage.setItem('quarto-color-scheme', '{'alternate' if scheme == 'dark' else 'default'}')")
    page.goto(f'{base}{name}.html', wait_until='load')
    page.wait_for_timeout(300)
    return page,wrong

def links_of(page): return page.evaluate("() => [...document.querySelectorAll('a[href]')].map(e => e.href)")
def ids_of(page): return set(page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)"))

def broken(links, ids, base, site, published):
    "Links into the site, by page, that lead nowhere; `published` is the address that they have"
    for name,found in links.items():
        for link in found:
            link = link.replace(published, base)
            if not link.startswith(base): continue
            url,anchor = urldefrag(link)
            target = urlparse(url).path.lstrip('/') or 'index.html'
            if not (site/target).is_file(): yield name,f'broken link: {target}'
            elif anchor and target.endswith('.html') and target[:-5] in ids and anchor not in ids[target[:-5]]: yield name,f'no such place: {target}#{anchor}'

def look(site, names, pictures, published):
    "Page -> what is wrong with it"
    base,found,links,ids = serve(site),{},{},{}
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which('chromium') or shutil.which('chromium-browser'), args=['--no-sandbox'])
        for name in names:
            for screen,width in widths.items():
                for scheme in schemes:
                    page,wrong = open_page(browser, base, name, width, scheme)
                    for js in looks.values(): wrong += page.evaluate(js)
                    found.setdefault(name, []).extend(f'{screen}, {scheme}: {w}' for w in dict.fromkeys(wrong))
                    if pictures: page.screenshot(path=pictures/f'{name.replace("/", "-")}-{screen}-{scheme}.png', full_page=True)
                    links[name],ids[name] = links_of(page),ids_of(page)
                    page.close()
        browser.close()
    for name,w in broken(links, ids, base, site, published): found[name].append(w)
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--site', type=Path, default=root/'_docs')
    p.add_argument('--pages', nargs='*', help='such as `index` or `losses/base`; all by default')
    p.add_argument('--pictures', type=Path, help='folder for a picture of each page')
    args = p.parse_args()
    if args.pictures: args.pictures.mkdir(parents=True, exist_ok=True)
    names = args.pages or pages_of(args.site)
    found = {k:v for k,v in look(args.site, names, args.pictures, f'{home()}/').items() if v}
    for name,wrong in found.items(): print(name, *dict.fromkeys(wrong), sep='\n    ')
    print(f'{len(names)} pages, {sum(map(len, found.values()))} findings on {len(found)}')
    sys.exit(bool(found))

if __name__ == '__main__': main()
