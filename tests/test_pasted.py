"What a reader pastes runs: only the code that the site shows of a page, from top to bottom, in a fresh process."
import ast, linecache, multiprocessing, os, re, sys, traceback
from pathlib import Path
import nbformat, pytest

root = Path(__file__).parents[1]
experiments = re.compile(r'skip_exec: *true')     # an hour each; tests/test_tutorials.py runs their code

def pages():
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        if not experiments.search(''.join(c.source for c in nbformat.read(p, 4).cells[:1])): yield p.relative_to(root/'nbs').with_suffix('').as_posix()

def shown(page):
    "The code of the cells that readers see, without commands of the shell"
    for c in nbformat.read(root/f'nbs/{page}.ipynb', 4).cells:
        flags = ' '.join(l.replace('#| ', '#|') for l in c.source.splitlines() if l.startswith('#|'))
        if c.cell_type != 'code' or any(f in flags for f in ('#|hide','#|export','#|default_exp','eval: false','echo: false')): continue
        if c.source.startswith('%%writefile'): yield write_file(*c.source.split('\n', 1))
        elif not c.source.startswith('%%'): yield '\n'.join(l for l in c.source.splitlines() if not l.startswith(('!','%')))

def write_file(line, text): return f"from pathlib import Path\nPath({line.split()[1]!r}.format(**globals())).write_text({text!r})"

def run(page, folder, out):
    "In a process of its own: write what went wrong"
    import matplotlib, warnings
    matplotlib.use('agg')
    warnings.simplefilter('ignore')
    os.chdir(folder)
    multiprocessing.set_start_method('fork', force=True)
    names = sys.modules['__main__'].__dict__     # where pickle looks for what a page defines
    names['__name__'] = '__main__'
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 1), os.dup2(null.fileno(), 2)
        try:
            for i,source in enumerate(shown(page)):
                where = f'{page}, cell {i}'
                linecache.cache[where] = len(source),None,source.splitlines(True),where     # for the message
                exec(compile(source, where, 'exec'), names)
        except BaseException: Path(out).write_text(traceback.format_exc(), encoding='utf-8')

@pytest.fixture(scope='module')
def fresh():
    "Processes that have nothing but the imports that all pages share"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['fastai.vision.all','fastdistill.all'])
    return context

@pytest.mark.pasted
@pytest.mark.parametrize('page', pages())
def test_pasted(page, fresh, tmp_path):
    here = tmp_path/'nbs'/Path(page).parent
    here.mkdir(parents=True)
    (tmp_path/'benchmarks').symlink_to(root/'benchmarks')
    out = tmp_path/'error.txt'
    p = fresh.Process(target=run, args=(page, here, out))
    p.start(), p.join(300)
    assert p.exitcode == 0, f'{page} ended with {p.exitcode}'
    assert not out.exists(), out.read_text()

def test_what_is_shown():
    "The reader sees imports first: of each page with code, the first cell has nothing else"
    for page in pages():
        cells = [*shown(page)]
        if cells and page != 'index': assert any(isinstance(n, (ast.Import,ast.ImportFrom)) for n in ast.parse(cells[0]).body), page
