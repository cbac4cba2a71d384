"What holds the repository together: metadata, README, pages and their links, imports."
import json, posixpath, re, runpy, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import entry_points, version
from pathlib import Path
import pytest, yaml

root = Path(__file__).resolve().parent.parent
pages = sorted((root/'nbs').glob('**/*.ipynb'))
def address(page): return page.relative_to(root/'nbs').with_suffix('').as_posix()
try: import tomllib
except ImportError: tomllib = None     # Python 3.10
nbdev3 = int(version('nbdev').split('.')[0]) >= 3

@pytest.fixture(scope='module')
def cfg():
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(root/'settings.ini')
    return parser['DEFAULT']

@pytest.mark.skipif(tomllib is None, reason='tomllib needs Python 3.11')
def test_pyproject_agrees_with_settings(cfg):
    proj = tomllib.loads((root/'pyproject.toml').read_text())
    assert proj['project']['name'] == cfg['lib_name'] and proj['project']['requires-python'] == f">={cfg['min_python']}"
    assert proj['project']['urls'] == dict(Repository=cfg['git_url'], Documentation=cfg['doc_host']+cfg['doc_baseurl'])
    assert proj['tool']['nbdev']['title'] == cfg['title']

def test_without_a_gpu_its_report_is_not_begun(tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = subprocess.run(['bash',str(root/'benchmarks/gpu.sh'),str(tmp_path/'out')], capture_output=True, text=True)
    assert done.returncode == 2 and 'PyTorch finds no GPU' in done.stderr and not (tmp_path/'out/report.md').exists()

def test_installed_package(cfg):
    import fastdistill
    assert fastdistill.__version__ == version('fastdistill') == cfg['version']
    assert [e.value for e in entry_points(group='nbdev') if e.name=='fastdistill'] == ['fastdistill._modidx:d']
    assert [e.value for e in entry_points(group='console_scripts') if e.name=='fastdistill'] == ['fastdistill.cli:main']
    changes = (root/'CHANGELOG.md').read_text()
    assert f"## {cfg['version']}" in changes

def test_readme_says_what_the_index_says():
    pytest.importorskip('nbconvert', reason='nbconvert renders the README')
    text,images = runpy.run_path(str(root/'.ci/readme.py'))['render']()
    assert (root/'README.md').read_text() == text, 'python .ci/readme.py renders it again'
    for name,image in images.items(): assert (root/name).read_bytes() == image
    assert (root/'index.ipynb').resolve() == root/'nbs/index.ipynb'

def test_no_module_imports_vision():
    "fastai.vision takes seconds, and only those who have images need it"
    code = """if True:
        import pkgutil, sys, fastdistill
        for m in pkgutil.walk_packages(fastdistill.__path__, 'fastdistill.'): __import__(m.name)
        print(*[m for m in sys.modules if m.startswith('fastai.vision')])"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()

def test_all_exports_what_the_modules_define():
    "Each name comes from the module that defines it, which exports it too"
    names = {}
    exec('from fastdistill.all import *', names)
    for n,o in names.items():
        if n.startswith('__'): continue
        module = sys.modules.get(getattr(o, '__module__', None))
        assert module and module.__name__.startswith('fastdistill.'), f'{n} is no function or class of ours'
        assert n in module.__all__ and getattr(module, n) is o

@pytest.mark.parametrize('page', pages, ids=address)
def test_figures_have_captions(page):
    "And captions have figures: with MPLBACKEND=agg no figure is stored"
    for c in json.loads(page.read_text())['cells']:
        source = ''.join(c['source'])
        has_figure = any('image/png' in o.get('data', {}) for o in c.get('outputs', []))
        if '#| output: false' not in source: assert has_figure == ('#| fig-cap: ' in source), source

@pytest.mark.parametrize('page', pages, ids=address)
def test_page_has_a_title_and_no_stored_error(page):
    cells = json.loads(page.read_text())['cells']
    assert re.match(r'# .+\n\n> .+', ''.join(cells[0]['source']))
    outputs = [o for c in cells for o in c.get('outputs', [])]
    assert not [o for o in outputs if o['output_type']=='error' or o.get('name')=='stderr']
    assert not re.search(r'[\s"\']/(tmp|root|home|var|Users)/', json.dumps([{**o.get('data', {}), 'text':o.get('text'), 'image/png':''} for o in outputs])), 'a path of the machine'
    exp = any('#| default_exp' in ''.join(c['source']) for c in cells)
    if exp: assert any(re.search(r'\btest_|\bassert ', ''.join(c['source'])) for c in cells), 'a page of code asserts'

@pytest.mark.parametrize('page', pages, ids=address)
def test_nothing_is_lost_of_the_first_cell(page):
    "nbdev takes title, description and `- skip_exec: true` from it, and drops the rest"
    text = ''.join(json.loads(page.read_text())['cells'][0]['source'])
    assert all(not l.strip() or l.startswith(('# ','> ','- ')) for l in text.splitlines())

def test_every_page_is_in_the_sidebar_once():
    def listed(entries):
        "Pages of a section and of the sections in it"
        return [p for e in entries for p in (listed(e['contents']) if isinstance(e, dict) else [e])]
    sidebar = yaml.safe_load((root/'nbs/sidebar.yml').read_text())['website']['sidebar']['contents']
    assert sorted(listed(sidebar)) == sorted(address(p)+'.ipynb' for p in pages)

@pytest.fixture(scope='module')
def processed():
    "The pages as nbdev hands them to Quarto"
    if nbdev3: pytest.skip('the docs are built with nbdev 2')
    code = 'from nbdev.serve import proc_nbs; print("cache:", proc_nbs(n_workers=0, force=True))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = Path(re.search('cache: (.*)', done.stdout)[1])
    return {address(p):json.loads((cache/f'{address(p)}.ipynb').read_text())['cells'] for p in pages}

def documented(cells): return ' '.join(re.findall(r'show_doc\(([\w.]+)', '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='code')))

def prose(cells): return '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='markdown')

def code_blocks(cell):
    "What the site shows of a cell in lines that do not wrap: its code, blocks of its text, signatures"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'raw': return []
    if cell['cell_type'] == 'markdown': return re.findall(r'```\w*\n(.*?)```', source, re.S)
    shown = [] if re.search(r'^#\| ?echo: *false', source, re.M) else [re.sub(r'^#\|.*\n', '', source, flags=re.M)]
    docs = (''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', []))
    return shown + [block for d in docs for block in re.findall(r'```\w*\n(.*?)```', d, re.S)]

@pytest.mark.slow
def test_lines_that_readers_see(processed):
    "About 88 characters fit beside the sidebar; outputs wrap"
    lines = [(page,l) for page,cells in processed.items() for c in cells for block in code_blocks(c) for l in block.splitlines()]
    assert not [o for o in lines if len(o[1]) > 88] and len(lines) > 3000

@pytest.mark.slow
def test_links_of_the_processed_pages(processed, cfg):
    "Each name of ours in backticks is a link, and each link within the site has its page and its heading"
    from fastdistill._modidx import d
    names = {s.removeprefix(f'{mod}.') for mod,syms in d['syms'].items() for s in syms}
    names = {n for n in names if not re.search(r'(^|\.)_', n)}
    site = cfg['doc_host'] + cfg['doc_baseurl'] + '/'
    text_of = {f'{page}.html':f'{prose(cells)} {documented(cells)}' for page,cells in processed.items()}
    n_links,wrong = 0,[]
    for page,cells in processed.items():
        text = re.sub(r'```.*?```', '', prose(cells), flags=re.S)
        bare = {n for n in re.findall(r'(?<!\[)`([\w.]+)`', text) if n in names}
        wrong += [f'{page}: no link for {n}' for n in bare]
        for url in re.findall(r'\]\(([^)\s]+)\)', text):
            target,_,anchor = url.removeprefix(site).partition('#')
            if url.startswith('http') and not url.startswith(site.rstrip('/')): continue
            if target.rstrip('/') == site.rstrip('/') or url.endswith(('.svg','.png')): continue
            if not target: target = f'{page}.html'     # within the page
            elif not url.startswith(site): target = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            n_links += 1
            if target not in text_of: wrong.append(f'{page}: {url} has no page')
            elif anchor not in text_of[target].lower().replace(' ', '-'): wrong.append(f'{page}: {url} has no heading')
    assert not wrong
    assert n_links > 10
