"The report: one file, also in a real browser."
import re, shutil, subprocess
from html.parser import HTMLParser
import matplotlib.pyplot as plt, pandas as pd, pytest
from fastdistill.report import write_report

class Links(HTMLParser):
    def __init__(self): super().__init__(); self.urls,self.images = [],0
    def handle_starttag(self, tag, attrs):
        self.images += tag == 'img'
        self.urls += [v for k,v in attrs if k in ('src','href')]

@pytest.fixture
def report(tmp_path):
    plt.close('all')
    fig,ax = plt.subplots()
    ax.plot([1,2])
    write_report(tmp_path/'report.html', 'A & B', [('Table <1>', pd.DataFrame(dict(a=[1,2])), ''), ('Figure', fig, 'A line'), ('', 'Some text', '')])
    return tmp_path/'report.html'

def test_report_needs_no_other_file(report):
    links = Links()
    links.feed(report.read_text(encoding='utf-8'))
    assert links.images == 1 and all(u.startswith('data:') for u in links.urls)
    text = report.read_text(encoding='utf-8')
    assert 'A &amp; B' in text and 'Table &lt;1&gt;' in text and 'url(' not in text and not plt.get_fignums()

browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
@pytest.mark.skipif(browser is None, reason='no Chromium on this machine')
def test_report_in_a_browser(report, tmp_path):
    "No failed request, nothing on the console, and pictures that have a size"
    page = report.read_text(encoding='utf-8')
    probe = ("<script>window.onerror=m=>document.title='error '+m;window.onload=()=>{"
             "document.title=[...document.images].map(i=>i.naturalWidth+'x'+i.naturalHeight+' '+i.getBoundingClientRect().width).join(',')"
             "+'|'+performance.getEntriesByType('resource').filter(r=>!r.name.startsWith('data:')).length}</script>")
    (tmp_path/'probe.html').write_text(page.replace('</body>', probe+'</body>'), encoding='utf-8')
    run = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', f'--user-data-dir={tmp_path/"profile"}', '--virtual-time-budget=3000',
                          '--dump-dom', (tmp_path/'probe.html').as_uri()], capture_output=True, text=True, timeout=120)
    images,requests = re.search(r'<title>(.*)</title>', run.stdout)[1].split('|')
    natural,shown = images.split(' ')
    assert min(map(int, natural.split('x'))) > 100 and float(shown) > 100 and requests == '0'
    assert 'CONSOLE' not in run.stderr and 'ERR_' not in run.stderr
